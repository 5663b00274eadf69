"""Families that write arguments in a notation of their own: Gemma 4's, and Python's.

They are reported as JSON while they are read, strings too. Knows nothing of the text around calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from server.text.json_text import dumped
from server.tools.call_writer import CallWriter
from server.tools.json_object import LITERAL, MAX_DEPTH
from server.tools.source import MismatchError, Reading, Source
from server.tools.syntaxes import CallSyntax, read_bare_object, read_closer

_IN_LITERAL = re.compile(r"[A-Za-z0-9_+.\-]*")
_HEX = "[0-9a-fA-F]"
_ESCAPE = re.compile(rf"\\(?:x({_HEX}{{2}})|u({_HEX}{{4}})|U({_HEX}{{8}})|([^xuU]))", re.DOTALL)
_ESCAPE_BEGUN = re.compile(rf"\\(?:x{_HEX}?|u{_HEX}{{0,3}}|U{_HEX}{{0,7}})?")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0"}


@dataclass(frozen=True, slots=True)
class Notation:
    """How values are written."""

    quotes: tuple[str, ...]
    #: Whether keys are written without quotes, up to a colon.
    has_bare_keys: bool = False
    #: Whether strings have Python's escapes.
    has_escapes: bool = False
    #: Words that JSON spells in another way.
    words: Mapping[str, str] = field(default_factory=dict)

    def value(self, source: Source, at: int, out: CallWriter, depth: int = 1) -> Reading[int]:
        """Add the value at `at`; return its end. Raises `MismatchError` if there is none."""
        at = yield from source.space(at)
        char = source.text[at]
        if char in "{[":
            return (yield from self._items(source, at, out, depth))
        if any(quote.startswith(char) for quote in self.quotes):
            return (yield from self._string(source, at, out))
        return (yield from self._literal(source, at, out))

    def _items(self, source: Source, at: int, out: CallWriter, depth: int) -> Reading[int]:
        """Add an object or a list, which may end with a comma."""
        if depth > MAX_DEPTH:
            raise MismatchError
        opener = source.text[at]
        closer = "}" if opener == "{" else "]"
        out.json(opener, at + 1)
        at = yield from source.space(at + 1)
        is_first = True
        while source.text[at] != closer:
            if not is_first:
                out.json(", ", at)
            is_first = False
            if opener == "{":
                at = yield from self._key(source, at, out)
            at = yield from self.value(source, at, out, depth + 1)
            at = yield from source.space(at)
            if (yield from source.word(at, ",", closer)) == ",":
                at = yield from source.space(at + 1)
        out.json(closer, at + 1)
        return at + 1

    def _key(self, source: Source, at: int, out: CallWriter) -> Reading[int]:
        """Add a key and its colon; return the position of the value."""
        if any(quote.startswith(source.text[at]) for quote in self.quotes):
            at = yield from self._string(source, at, out)
            at = yield from source.space(at)
            yield from source.word(at, ":")
        elif self.has_bare_keys:
            key, end, _ = yield from source.until(at, ":")
            at = end - 1
            out.json(dumped(key), at)
        else:
            raise MismatchError
        out.json(": ", at + 1)
        return at + 1

    def _string(self, source: Source, at: int, out: CallWriter) -> Reading[int]:
        """Add the string at `at` as it arrives; return its end."""
        quote = yield from source.word(at, *self.quotes)
        at += len(quote)
        out.json('"', at)
        stops = (quote, "\\") if self.has_escapes else (quote,)
        while True:
            at, stop = yield from out.characters(at, *stops)
            if stop == quote:
                out.json('"', at + len(quote))
                return at + len(quote)
            at = yield from _read_escape(source, at, out)

    def _literal(self, source: Source, at: int, out: CallWriter) -> Reading[int]:
        while True:
            found = _IN_LITERAL.match(source.text, at)
            end = at if found is None else found.end()
            if end < len(source.text):
                break
            yield from source.more()
        word = source.text[at:end]
        word = self.words.get(word, word)
        if not LITERAL.fullmatch(word):
            raise MismatchError
        out.json(word, end)
        return end


def _read_escape(source: Source, at: int, out: CallWriter) -> Reading[int]:
    """Add the character of an escape in Python's notation; an unknown escape is added as it is."""
    while _ESCAPE_BEGUN.fullmatch(source.text, at):
        yield from source.more()
    found = _ESCAPE.match(source.text, at)
    if found is None:
        out.json("\\\\", at + 1)
        return at + 1
    *digits, letter = found.groups()
    if letter is None:
        code = int(next(filter(None, digits)), 16)
        if code > 0x10FFFF:
            raise MismatchError
        # In ASCII: half a surrogate pair is a character that UTF-8 does not have.
        out.json(json.dumps(chr(code))[1:-1], found.end())
    elif letter in "'\"\\" or letter in _ESCAPED:
        out.json(dumped(_ESCAPED.get(letter, letter))[1:-1], found.end())
    elif letter != "\n":
        out.json(dumped(found.group())[1:-1], found.end())
    return found.end()


_GEMMA_NOTATION = Notation(('<|"|>',), has_bare_keys=True)
_PYTHON = Notation(
    ("'", '"'), has_escapes=True, words={"True": "true", "False": "false", "None": "null"}
)


def _read_gemma(source: Source, at: int, out: CallWriter) -> Reading[None]:
    """Read `call:NAME{KEY:VALUE,...}<tool_call|>`."""
    yield from source.word(at, "call:")
    at += len("call:")
    end = yield from source.name(at)
    yield from source.word(end, "{")
    out.start(source.text[at:end], end)
    at = yield from _GEMMA_NOTATION.value(source, end, out)
    out.end(at)
    yield from read_closer(source, at, "<tool_call|>")


def _read_pythonic(source: Source, at: int, out: CallWriter) -> Reading[None]:
    """Read `[NAME(KEY=VALUE, ...), ...]<|python_end|>`, or calls that are objects."""
    at = yield from source.space(at)
    if source.text[at] == "{":
        yield from read_bare_object(source, at, out)
        return
    at = yield from _read_python_list(source, at, out)
    yield from read_closer(source, at, "<|python_end|>")


def _read_bare_pythonic(source: Source, at: int, out: CallWriter) -> Reading[None]:
    if source.text[at] == "{":
        yield from read_bare_object(source, at, out)
    else:
        yield from _read_python_list(source, at, out, is_bare=True)


def _read_python_list(
    source: Source, at: int, out: CallWriter, *, is_bare: bool = False
) -> Reading[int]:
    mark = yield from source.word(at, "[")
    at += 1
    while mark != "]":
        at = yield from source.space(at)
        end = yield from source.name(at)
        name = source.text[at:end]
        yield from source.word(end, "(")
        if is_bare and not out.is_offered(name):
            raise MismatchError
        out.start(name, end)
        at = yield from _read_python_members(source, end, out)
        out.end_members(at)
        at, mark = yield from source.skip(at, ",", "]")
    source.pos = at
    return at


def _read_python_members(source: Source, at: int, out: CallWriter) -> Reading[int]:
    """Add the arguments in a call's parentheses, which open at `at`; return their end."""
    at = yield from source.space(at + 1)
    while source.text[at] != ")":
        end = yield from source.name(at)
        key = source.text[at:end]
        at = yield from source.space(end)
        yield from source.word(at, "=")
        if not out.key(key, at):
            # Python does not allow it either.
            raise MismatchError
        at = yield from _PYTHON.value(source, at + 1, out)
        at = yield from source.space(at)
        if (yield from source.word(at, ",", ")")) == ",":
            at = yield from source.space(at + 1)
    return at + 1


GEMMA = CallSyntax(
    "gemma4",
    ("<|tool_call>",),
    _read_gemma,
    read_bare=read_bare_object,
    has_special_marks=True,
    keeps_spaces=True,
)
PYTHONIC = CallSyntax(
    "pythonic",
    ("<|python_start|>",),
    _read_pythonic,
    read_bare=_read_bare_pythonic,
    bare_openers="[{",
    has_special_marks=True,
)
