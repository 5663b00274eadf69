"""Reads one JSON object as its text grows: the first wrong character is noticed at once.

RFC 8259, except that strings may contain newlines and tabs, as models write them. Every character
is read once, however the text is cut. Knows nothing of calls.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from enum import Enum, auto

#: Deeper objects are refused: the parsers of clients have limits too.
MAX_DEPTH = 100

_SPACE = re.compile(r"[ \t\n\r]*")
_IN_STRING = re.compile(r'[^"\\]*')
#: Control characters, and halves of surrogate pairs, which UTF-8 does not have.
_CONTROL = re.compile(r"[\x00-\x1f\ud800-\udfff]")
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_ESCAPE_BEGUN = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_IN_LITERAL = re.compile(r"[A-Za-z0-9+.\-]*")
LITERAL = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")


class Status(Enum):
    """How far an object has been read."""

    OPEN = auto()
    DONE = auto()
    BROKEN = auto()


class _Next(Enum):
    """The kind of token that may come next."""

    VALUE = auto()
    VALUE_OR_END = auto()
    KEY = auto()
    KEY_OR_END = auto()
    COLON = auto()
    COMMA_OR_END = auto()


_VALUE_PLACES = (_Next.VALUE, _Next.VALUE_OR_END)
_KEY_PLACES = (_Next.KEY, _Next.KEY_OR_END)
_END_PLACES = (_Next.VALUE_OR_END, _Next.KEY_OR_END, _Next.COMMA_OR_END)


class JsonObject:
    """An object that begins at `start` of a text."""

    def __init__(self, start: int) -> None:
        self.start = start
        #: Up to here the text has been read; the object's end once it is done.
        self.pos = start
        self.status = Status.OPEN
        #: Where the values of its own keys begin in the text, by key; of two alike, the first.
        self.starts: dict[str, int] = {}
        #: Where the complete ones end.
        self.ends: dict[str, int] = {}
        #: Own keys read so far, one without its value included, and where each ends.
        self.keys: list[str] = []
        self.key_ends: list[int] = []
        self._closers: list[str] = []
        self._next = _Next.VALUE
        self._is_in_string = False
        self._is_in_literal = False
        self._lexeme_start = start
        #: Where characters stand in strings that strict JSON escapes, in order.
        self._controls: list[int] = []

    @property
    def known(self) -> int:
        """The end of the text that is certain: a literal has to end first."""
        return self._lexeme_start if self._is_in_literal else self.pos

    def strict(self, text: str, start: int, end: int) -> str:
        """Return `text[start:end]`, which has been read, as strict JSON."""
        first = bisect_left(self._controls, start)
        controls = self._controls[first : bisect_left(self._controls, end)]
        parts = []
        for at in controls:
            parts += [text[start:at], json.dumps(text[at])[1:-1]]
            start = at + 1
        return "".join([*parts, text[start:end]])

    def advance(self, text: str) -> Status:
        """Read on in `text`, which begins with all that was read before."""
        while self.status is Status.OPEN and self._step(text):
            pass
        return self.status

    def _step(self, text: str) -> bool:
        """Read a lexeme; False: more text is needed."""
        if self._is_in_string:
            return self._read_string(text)
        if self._is_in_literal:
            return self._read_literal(text)
        self.pos = _end(_SPACE, text, self.pos)
        if self.pos == len(text):
            return False
        self._begin(text[self.pos])
        return True

    def _begin(self, char: str) -> None:
        is_value = self._next in _VALUE_PLACES
        if is_value and len(self._closers) == 1:
            self.starts.setdefault(self.keys[-1], self.pos)
        if not self._closers and char != "{":
            self.status = Status.BROKEN
        elif is_value and char in "{[" and len(self._closers) < MAX_DEPTH:
            self._closers.append("}" if char == "{" else "]")
            self._next = _Next.KEY_OR_END if char == "{" else _Next.VALUE_OR_END
            self.pos += 1
        elif char == '"' and (is_value or self._next in _KEY_PLACES):
            self._is_in_string = True
            self._lexeme_start = self.pos
            self.pos += 1
        elif self._next in _END_PLACES and char == self._closers[-1]:
            self.pos += 1
            self._closers.pop()
            self._end_value()
        elif self._next is _Next.COMMA_OR_END and char == ",":
            self.pos += 1
            self._next = _Next.KEY if self._closers[-1] == "}" else _Next.VALUE
        elif self._next is _Next.COLON and char == ":":
            self.pos += 1
            self._next = _Next.VALUE
        elif is_value and (char == "-" or (char.isascii() and char.isalnum())):
            self._is_in_literal = True
            self._lexeme_start = self.pos
        else:
            self.status = Status.BROKEN

    def _read_string(self, text: str) -> bool:
        end = _end(_IN_STRING, text, self.pos)
        self._controls += (found.start() for found in _CONTROL.finditer(text, self.pos, end))
        self.pos = end
        if end == len(text):
            return False
        if text[end] == '"':
            self.pos += 1
            self._is_in_string = False
            self._end_string(text[self._lexeme_start : self.pos])
            return True
        escape = _ESCAPE.match(text, end)
        if escape is not None:
            self.pos = escape.end()
            return True
        if _ESCAPE_BEGUN.fullmatch(text, end):
            return False
        self.status = Status.BROKEN
        return True

    def _read_literal(self, text: str) -> bool:
        self.pos = _end(_IN_LITERAL, text, self.pos)
        if self.pos == len(text):
            return False
        if not LITERAL.fullmatch(text, self._lexeme_start, self.pos):
            self.status = Status.BROKEN
            return True
        self._is_in_literal = False
        self._end_value()
        return True

    def _end_string(self, quoted: str) -> None:
        if self._next not in _KEY_PLACES:
            self._end_value()
            return
        if len(self._closers) == 1:
            self.keys.append(json.loads(quoted, strict=False))
            self.key_ends.append(self.pos)
        self._next = _Next.COLON

    def _end_value(self) -> None:
        self._next = _Next.COMMA_OR_END
        if len(self._closers) == 1:
            self.ends.setdefault(self.keys[-1], self.pos)
        elif not self._closers:
            self.status = Status.DONE


def _end(pattern: re.Pattern[str], text: str, pos: int) -> int:
    """Return the end of the run of `pattern`, which may be empty."""
    found = pattern.match(text, pos)
    return pos if found is None else found.end()
