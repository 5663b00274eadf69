"""Converts text to token ids and back, exactly.

Wraps a `tokenizers.Tokenizer` for encoding. Decoding is our own, from the tokens' bytes, so that a
stream of tokens gives the same text as the whole. Knows nothing of files or templates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import tokenizers
from tokenizers import processors

from server.text.bounds import PIECE_CHARS, Bounds
from server.text.quoting import Quoting, without_marks
from server.text.token_bytes import TextError, TokenBytes, read_form


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """The special tokens in a model's files."""

    bos_token_id: int | None = None
    #: Each of them ends a text; the first is the `eos_token` of templates.
    eos_token_ids: tuple[int, ...] = ()
    #: Whether encoding puts bos in front and eos behind; None: as in the tokenizer itself.
    adds_bos: bool | None = None
    adds_eos: bool | None = None


class Tokenizer:
    """One model's vocabulary. Immutable; every method may be called from any thread.

    `decode` reads the tokens' bytes as UTF-8, each broken sequence as one U+FFFD. `tokenizers` does
    the same, except for a row of `<0xNN>` tokens that is not valid UTF-8. There it drops the valid
    ones too, so no character is certain before the row ends.
    """

    def __init__(self, core: tokenizers.Tokenizer, ids: SpecialIds) -> None:
        """Raise `TextError` if `core` decodes in a way that cannot be streamed."""
        core.no_truncation()
        core.no_padding()
        self._core = core
        self._form = read_form(core.decoder)
        vocabulary = core.get_vocab(with_added_tokens=True)
        #: Largest id and one: ids may have holes.
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.bos_token_id = ids.bos_token_id
        self.eos_token_ids = ids.eos_token_ids
        added = core.get_added_tokens_decoder()
        # A bos that is never added may be plain text: a comma, in some GGUF files.
        bos = ids.bos_token_id if ids.adds_bos else None
        named = {*ids.eos_token_ids, *(() if bos is None else (bos,))}
        self.special_token_ids = frozenset(
            named | {token_id for token_id, token in added.items() if token.special}
        )
        self._prefix, self._suffix = _frame(core, ids)
        self._quoting = Quoting(core, self.special_token_ids)
        self.quote = self._quoting.quote
        omitted = sorted(self.special_token_ids)
        self._bytes_by_id = TokenBytes(core, self._form, self.vocab_size, ())
        self._plain_bytes_by_id = TokenBytes(core, self._form, self.vocab_size, omitted)

    @property
    def leading_spaces(self) -> int:
        """How many spaces the start of a decoded text loses at most (SentencePiece)."""
        return self._form.leading_spaces

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool,
        is_quoted: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> list[int]:
        """Return the token ids of `text`; special tokens written in it are recognised as such.

        `is_quoted`: except in parts that `quote` returned. `add_special_tokens`: bos and eos around
        it, as the model expects of a plain prompt; a rendered chat template has its own. Releases
        the GIL. `check` is called now and then, and may raise. Raises `TextError` if `text` is not
        valid Unicode, or too long to be encoded whole and has no border to cut it.
        """
        if is_quoted and self._quoting.needs(text):
            core, text = self._quoting.core, self._quoting.respelled(text)
            token_ids = self._quoting.token_ids(self._encoded(core, text, check))
        else:
            token_ids = self._encoded(self._core, text, check)
        return [*self._prefix, *token_ids, *self._suffix] if add_special_tokens else token_ids

    def least_tokens(self, text: str) -> int:
        """Return a lower bound of the tokens of `text`: fast, and often far below the count."""
        return self._bounds.least_tokens(without_marks(text))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of `token_ids`. Ids outside the vocabulary are empty."""
        pieces = self.bytes_by_id(skip_special_tokens=skip_special_tokens)
        data = b"".join(
            b"".join(map(pieces.__getitem__, token_ids[start : start + PIECE_CHARS]))
            for start in range(0, len(token_ids), PIECE_CHARS)
        )
        return drop_spaces(data, self.leading_spaces).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the exact bytes of a token, whether or not they are whole characters."""
        return self._bytes_by_id[token_id]

    def token_text(self, token_id: int) -> str:
        r"""Return a token's text as OpenAI does: `bytes:\xe2\x80` where it is not valid UTF-8."""
        data = self._bytes_by_id[token_id]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def first_difference(self, other: Tokenizer) -> int | None:
        """Return the least id that stands for another text in `other`; None: there is none.

        Special tokens may have other names there.
        """
        special = self.special_token_ids | other.special_token_ids
        for token_id in range(max(self.vocab_size, other.vocab_size)):
            is_same = self.token_bytes(token_id) == other.token_bytes(token_id)
            if not is_same and token_id not in special:
                return token_id
        return None

    def to_json(self) -> str:
        """Return the text of a tokenizer.json that puts the same tokens around a plain prompt."""
        core = tokenizers.Tokenizer.from_str(self._core.to_str())
        if self._prefix or self._suffix:
            framing = {core.id_to_token(i): i for i in (*self._prefix, *self._suffix)}
            before, behind = (
                [f"{core.id_to_token(i)}:0" for i in ids] for ids in (self._prefix, self._suffix)
            )
            core.post_processor = processors.TemplateProcessing(
                single=[*before, "$A:0", *behind], special_tokens=[*framing.items()]
            )
        text: str = core.to_str(pretty=True)
        return text

    def bytes_by_id(self, *, skip_special_tokens: bool) -> TokenBytes:
        """Return the bytes by token id; skipped special tokens are empty."""
        return self._plain_bytes_by_id if skip_special_tokens else self._bytes_by_id

    @cached_property
    def _bounds(self) -> Bounds:
        return Bounds(self._core, self._form)

    def _encoded(
        self, core: tokenizers.Tokenizer, text: str, check: Callable[[], None]
    ) -> list[int]:
        if len(text) <= PIECE_CHARS:
            return _encoded(core, text)
        token_ids: list[int] = []
        for piece in self._bounds.pieces(text):
            check()
            token_ids += _encoded(core, piece)
        return token_ids


def _encoded(core: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        # Unlike `encode`, it releases the GIL and computes no offsets.
        token_ids: list[int] = core.encode_batch_fast([text], add_special_tokens=False)[0].ids
    except TypeError as error:
        raise TextError("text holds a lone surrogate: it is not valid Unicode") from error
    return token_ids


def _frame(core: tokenizers.Tokenizer, ids: SpecialIds) -> tuple[Sequence[int], Sequence[int]]:
    """Return the ids put in front and behind; by default those of `core`."""
    if ids.adds_bos is None and ids.adds_eos is None:
        bare, framed = (core.encode("a", add_special_tokens=adds).ids for adds in (False, True))
        ends = range(len(framed), -1, -1)
        at = next((at for at in ends if framed[at : at + len(bare)] == bare), 0)
        return framed[:at], framed[at + len(bare) :]
    bos = ids.bos_token_id
    prefix = (bos,) if ids.adds_bos and bos is not None else ()
    return prefix, ids.eos_token_ids[:1] if ids.adds_eos else ()


def drop_spaces(data: bytes, count: int) -> bytes:
    """Return `data` without up to `count` of its leading spaces."""
    return data[min(count, len(data) - len(data.lstrip(b" "))) :] if count else data
