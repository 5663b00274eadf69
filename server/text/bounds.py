"""Bounds for a text before it is encoded: the least number of its tokens, and where to cut it.

Both follow from the tokenizer's parts. A tokenizer with other parts has no bounds.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping

import orjson
import tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from server.text.token_bytes import BYTE_LEVEL_ALPHABET, TextError, TokenForm, flat_steps

#: Pieces are a little longer: each ends with a word. Encoding one takes 8 MiB.
PIECE_CHARS = 1 << 16
#: A text without borders is encoded whole, which takes over a hundred times its size.
MAX_UNCUT_CHARS = 1 << 19
_LETTER = r"[^\W\d_]"
#: Behind a letter, these begin a word or precede one. The apostrophe does not in every language.
_BORDERS = (
    " \n" + string.digits + string.punctuation.replace("'", "") + "\uff0c\u3002\u3001\uff01\uff1f"
)
_BYTES = frozenset(range(256))
_PRINTED = frozenset(range(0x21, 0x7F))
#: Parts that drop nothing and depend only on the text nearby.
_KNOWN = {"NFC", "Prepend", "Digits", "ByteLevel", "Metaspace"}


class Bounds:
    """The bounds of one tokenizer. Immutable; may be used from any thread."""

    def __init__(self, core: tokenizers.Tokenizer, form: TokenForm) -> None:
        """Derive them from `core`, in 2 µs a token."""
        self._core = core
        steps = [
            *_steps(core.normalizer, "normalizers"),
            *_steps(core.pre_tokenizer, "pretokenizers"),
        ]
        is_bpe = isinstance(core.model, tokenizers.models.BPE) and not core.model.dropout
        self._is_known = is_bpe and all(map(_is_known, steps))
        vocabulary = core.get_vocab(with_added_tokens=True)
        tokens = [form.bytes_of(token) for token in vocabulary]
        added = core.get_added_tokens_decoder().values()
        counted = _encodable(core, form, vocabulary) if self._is_known else frozenset()
        if any(step["type"] == "NFC" for step in steps):
            counted &= _PRINTED  # NFC may merge others
        kinds = [counted & _PRINTED]
        if not any(token.lstrip or token.rstrip for token in added):
            kinds.append(counted)  # spaces too: no token takes any number of them
        #: Uncounted bytes, and the most counted bytes that one token holds.
        self._measures = [
            (others, max(len(token.translate(None, others)) for token in tokens))
            for others in (bytes(_BYTES - kind) for kind in kinds)
        ]
        self._leads = self._safe_leads(tokens) if self._is_known else {}
        borders = "".join(map(re.escape, self._leads))
        self._border = re.compile(
            rf"[{borders}](?<={_LETTER}.)(?=.)" if borders else "(?!)", re.DOTALL
        )

    def least_tokens(self, text: str) -> int:
        """Return a lower bound of the tokens of `text`, for any text around it."""
        counts = [0] * len(self._measures)
        for start in range(0, len(text), PIECE_CHARS):
            data = text[start : start + PIECE_CHARS].encode(errors="ignore")
            for index, (others, _) in enumerate(self._measures):
                counts[index] += len(data.translate(None, others))
        measured = zip(counts, self._measures, strict=True)
        return max(-(-count // most) if most else 0 for count, (_, most) in measured)

    def pieces(self, text: str) -> Iterator[str]:
        """Yield pieces of `text` that have the same tokens as the whole.

        Raises `TextError` if too long a part has no border between words.
        """
        start, lead = 0, ""
        while (border := self._next_border(text, start + PIECE_CHARS)) is not None:
            yield self._fit(lead + text[start:border])
            start, lead = border + 1, self._leads[text[border]]
        yield self._fit(lead + text[start:])

    def _next_border(self, text: str, start: int) -> int | None:
        """Return the position of the next border; other threads get the GIL between windows."""
        for at in range(start, len(text), PIECE_CHARS):
            found = self._border.search(text, at, at + PIECE_CHARS + 1)
            if found:
                return found.start()
        return None

    def _fit(self, piece: str) -> str:
        if self._is_known and len(piece) > MAX_UNCUT_CHARS:
            message = f"text holds {len(piece)} characters without a border between words"
            raise TextError(f"{message}; at most {MAX_UNCUT_CHARS} can be encoded")
        return piece

    def _safe_leads(self, tokens: list[bytes]) -> dict[str, str]:
        """Return the first characters of the piece behind each border that splits no token.

        It is the border itself, unless the tokenizer puts a space in front of each text.
        """
        written = "\0".join(token.decode(errors="ignore") for token in tokens)
        spanned = set(re.findall(rf"(?<={_LETTER})[^\w\s]|(?<={_LETTER})[\s\d_]", written))
        added = self._core.get_added_tokens_decoder().values()
        wordlike = [token for token in added if token.content[-1:].isalpha()]
        takes_spaces = any(token.rstrip for token in wordlike)
        safe = {}
        for border in sorted(set(_BORDERS) - spanned):
            # Text behind an added token gets a space in front too.
            leads = (border,) if wordlike else (border, "")
            lead = next((lead for lead in leads if self._joins(border, lead)), None)
            if lead is not None and not (takes_spaces and border.isspace()):
                safe[border] = lead
        return safe

    def _joins(self, border: str, lead: str) -> bool:
        """Return whether pieces of a few texts with this border have the tokens of the whole."""
        return all(
            self._ids(left + border + right) == self._ids(left) + self._ids(lead + right)
            for left in ("a", "hello", "a 1 B", "日")
            for right in ("a", "wo rld", "1", ".", " x", "\n\nx", "\u65e5")
        )

    def _ids(self, text: str) -> list[int]:
        return list(self._core.encode(text, add_special_tokens=False).ids)


def _steps(part: Normalizer | PreTokenizer | None, inner: str) -> list[Mapping[str, object]]:
    if part is None:
        return []
    return [*flat_steps(orjson.loads(part.__getstate__()), inner)]


def _is_known(step: Mapping[str, object]) -> bool:
    match step:
        case {"type": "Replace", "pattern": {"String": str(spaces)}}:
            return not spaces.strip(" ")
        case {"type": "Split", "behavior": str(behavior)}:
            return behavior != "Removed"
        case _:
            return step["type"] in _KNOWN


def _encodable(
    core: tokenizers.Tokenizer, form: TokenForm, vocabulary: dict[str, int]
) -> frozenset[int]:
    """Return the bytes that are never lost for lack of a token."""
    if form.is_byte_level:
        letters = enumerate(BYTE_LEVEL_ALPHABET)
        return frozenset(byte for byte, letter in letters if letter in vocabulary)
    falls_back = core.model.byte_fallback and all(f"<0x{b:02X}>" in vocabulary for b in _BYTES)
    return _BYTES if falls_back else frozenset()
