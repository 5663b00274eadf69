"""A page of keys and values as bytes: the layout of a record, its identity and its checksum.

    header   magic, version, flags, tokens a page, variant, namespace, parent chain, own chain,
             time of writing, class of lifetime, bytes of the payload
    tokens   the page's own, 32 bits each
    payload  the bytes of the page in all layers
    digest   of all before

Numbers are little-endian. A chain is the digest of a page's tokens and of the chain before it. So
it stands for all tokens up to the page's end, in one namespace of one variant. A variant is all
that the payload depends on besides tokens: weights, arithmetic, format. Knows nothing of files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from struct import Struct, pack
from typing import NamedTuple, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

_MAGIC = b"octavoKV"
VERSION = 1
#: Of a record that must not be used any more.
DELETED = 1
_HEADER = Struct("<8sHHHxx32s32s16s16sQB7xQ")
#: Where the flags stand in a record.
FLAGS_OFFSET = 10
HEADER_BYTES = _HEADER.size
_TOKEN_BYTES = 4
_DIGEST_BYTES = 16
#: The chain before a prompt's first page.
_NO_CHAIN = bytes(_DIGEST_BYTES)


class PageKey(NamedTuple):
    """The identity of a page within one variant."""

    #: A digest of the namespace's name.
    namespace: bytes
    #: The chain of the page before.
    parent: bytes
    chain: bytes
    tokens: bytes


class Header(NamedTuple):
    """A record without its payload."""

    flags: int
    page_tokens: int
    variant: bytes
    namespace: bytes
    parent: bytes
    chain: bytes
    written_at_s: int
    ttl_class: int
    payload_bytes: int

    @property
    def num_bytes(self) -> int:
        """The size of the record."""
        return record_bytes(self.page_tokens, self.payload_bytes)


def record_bytes(page_tokens: int, payload_bytes: int) -> int:
    """Return the size of a record."""
    return HEADER_BYTES + page_tokens * _TOKEN_BYTES + payload_bytes + _DIGEST_BYTES


def page_keys(
    tokens: Sequence[int], page_tokens: int, variant: bytes, namespace: bytes
) -> list[PageKey]:
    """Return the keys of all whole pages of `tokens`. About a microsecond a page."""
    packed, size = pack(f"<{len(tokens)}I", *tokens), page_tokens * _TOKEN_BYTES
    keys, parent = list[PageKey](), _NO_CHAIN
    for start in range(0, len(packed) - size + 1, size):
        page = packed[start : start + size]
        chain = _chain(parent, page, variant, namespace)
        keys.append(PageKey(namespace, parent, chain, page))
        parent = chain
    return keys


def pack_record(
    key: PageKey, payload: Buffer, variant: bytes, written_at_s: int
) -> tuple[bytes, Buffer, bytes]:
    """Return a record in three pieces, of which the payload is the second."""
    page_tokens = len(key.tokens) // _TOKEN_BYTES
    head = _HEADER.pack(
        _MAGIC,
        VERSION,
        0,
        page_tokens,
        variant,
        key.namespace,
        key.parent,
        key.chain,
        written_at_s,
        0,
        len(payload),
    )
    head += key.tokens
    return head, payload, _digest(head, payload)


def read_header(head: Buffer) -> Header | None:
    """Return the header that a record begins with; None if there is none of this version."""
    if len(head) < HEADER_BYTES:
        return None
    magic, version, *fields = _HEADER.unpack_from(head)
    return Header(*fields) if (magic, version) == (_MAGIC, VERSION) else None


def is_whole_header(head: Buffer, header: Header) -> bool:
    """Return whether the chain in a header is that of the tokens behind it."""
    tokens = bytes(head[HEADER_BYTES : HEADER_BYTES + header.page_tokens * _TOKEN_BYTES])
    return header.chain == _chain(header.parent, tokens, header.variant, header.namespace)


def payload_of(record: memoryview, key: PageKey, variant: bytes) -> memoryview | None:
    """Return the payload of the record of this very page; None if it is another or damaged."""
    header = read_header(record)
    if header is None or header.flags or header.num_bytes != len(record):
        return None
    tokens_end = HEADER_BYTES + header.page_tokens * _TOKEN_BYTES
    found = header.variant, header.namespace, header.parent, header.chain
    if found != (variant, key.namespace, key.parent, key.chain):
        return None
    # Compared, although the chain depends on them: a digest is not a proof.
    if record[HEADER_BYTES:tokens_end] != key.tokens:
        return None
    return record[tokens_end:-_DIGEST_BYTES] if is_intact(record) else None


def is_intact(record: memoryview) -> bool:
    """Return whether the digest of a whole record is right. Deleted ones have a wrong one."""
    return record[-_DIGEST_BYTES:] == _digest(record[:-_DIGEST_BYTES])


def _chain(parent: bytes, tokens: bytes, variant: bytes, namespace: bytes) -> bytes:
    return _digest(parent + tokens + variant + namespace)


def _digest(*pieces: Buffer) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for piece in pieces:
        digest.update(piece)
    return digest.digest()
