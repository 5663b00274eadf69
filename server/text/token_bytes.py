"""The exact bytes that each token id stands for, read from a tokenizer's own decoder.

Text made of bytes can be put together token by token in O(1), unlike with a decoder that needs all
tokens again. Two families cover the decoders of language models: byte-level BPE
(GPT-2's alphabet of 256 printable letters) and SentencePiece (`▁` for a space, `<0xNN>` for a
byte). Knows nothing of streams, files or templates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import orjson
import tokenizers
from tokenizers.decoders import Decoder

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SUPPORTED = "ByteLevel, Metaspace, or Replace + ByteFallback + Fuse + Strip"


class TextError(ValueError):
    """A tokenizer or template that cannot be used, or text that cannot be tokenised."""


def _byte_level_alphabet() -> str:
    """Return GPT-2's letters of the bytes: printable ones are themselves, others from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


BYTE_LEVEL_ALPHABET = _byte_level_alphabet()
_BYTE_OF_LETTER = {letter: byte for byte, letter in enumerate(BYTE_LEVEL_ALPHABET)}


@dataclass(frozen=True, slots=True)
class TokenForm:
    """How a vocabulary writes bytes down as token strings."""

    is_byte_level: bool = False
    has_byte_tokens: bool = False
    #: (written, meant), applied in order.
    replacements: tuple[tuple[str, str], ...] = ()
    #: Spaces dropped from the start of a whole text, if it begins with any.
    leading_spaces: int = 0

    def bytes_of(self, token: str) -> bytes:
        """Return the bytes of `token`; added tokens outside the byte alphabet are themselves."""
        if self.is_byte_level:
            try:
                return bytes(map(_BYTE_OF_LETTER.__getitem__, token))
            except KeyError:
                return token.encode()
        if self.has_byte_tokens and (found := _BYTE_TOKEN.fullmatch(token)):
            return bytes((int(found.group(1), 16),))
        for written, meant in self.replacements:
            token = token.replace(written, meant)
        return token.encode()


def flat_steps(step: Mapping[str, object], inner: str) -> Iterator[Mapping[str, object]]:
    """Yield the steps of a part of a tokenizer; a sequence has them under the key `inner`."""
    nested = step.get(inner)
    if step.get("type") != "Sequence" or not isinstance(nested, list):
        yield step
        return
    for one in nested:
        yield from flat_steps(one, inner)


def read_form(decoder: Decoder | None) -> TokenForm:
    """Return the form of the tokens that `decoder` reads.

    Raises `TextError` for a decoder with a step that cannot be done token by token.
    """
    if decoder is None:
        raise TextError(f"the tokenizer has no decoder; supported: {_SUPPORTED}")
    form, is_fused = TokenForm(), False
    for step in flat_steps(orjson.loads(decoder.__getstate__()), "decoders"):
        match step:
            case {"type": "ByteLevel"}:
                form = replace(form, is_byte_level=True)
            case {"type": "ByteFallback"}:
                form = replace(form, has_byte_tokens=True)
            case {"type": "Fuse"}:
                is_fused = True
            case {"type": "Replace", "pattern": {"String": str(written)}, "content": str(meant)}:
                form = replace(form, replacements=(*form.replacements, (written, meant)))
            case {"type": "Metaspace", "replacement": str(written), "prepend_scheme": str(scheme)}:
                replacements = (*form.replacements, (written, " "))
                spaces = 0 if scheme == "never" else 1
                form = replace(form, replacements=replacements, leading_spaces=spaces)
            # Before Fuse it would strip every token, not the text.
            case {"type": "Strip", "content": " ", "start": int(count), "stop": 0} if is_fused:
                form = replace(form, leading_spaces=count)
            case _:
                name = orjson.dumps(step).decode()
                message = f"the tokenizer's decoder has a step {name}; supported: {_SUPPORTED}"
                raise TextError(message)
    return form


class TokenBytes(dict[int, bytes]):
    """Bytes of each token id, filled in at the first use of an id.

    A dict with `__missing__`, because `map(pieces.__getitem__, ids)` then runs at the speed of C
    on the API's event loop. Ids outside the vocabulary have no bytes and are not stored.
    Safe to share between threads: two of them would write the same value.
    """

    def __init__(
        self, core: tokenizers.Tokenizer, form: TokenForm, vocab_size: int, omitted: Sequence[int]
    ) -> None:
        super().__init__((token_id, b"") for token_id in omitted)
        self._core = core
        self._form = form
        self._vocab_size = vocab_size

    def __missing__(self, token_id: int) -> bytes:
        if not 0 <= token_id < self._vocab_size:
            return b""
        token = self._core.id_to_token(token_id)
        piece = b"" if token is None else self._form.bytes_of(token)
        self[token_id] = piece
        return piece
