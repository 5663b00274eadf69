"""How the families of models write calls: each reads the calls that begin at one place.

A syntax tells each call as soon as it is complete, by `Found`. It raises `MismatchError` where
there is no (further) call and `EndedError` where the text ends within one. What closes a call may
be missing: models forget it. Knows nothing of the text around calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from server.text.json_text import with_escapes
from server.tools.events import Call, SpelledCall
from server.tools.json_object import JsonObject, Status
from server.tools.source import TOOL_NAME, EndedError, MismatchError, Reading, Source

#: Takes a call and where it ends.
Found = Callable[[Call | SpelledCall, int], None]

_NAME = re.compile(TOOL_NAME)
#: What a bare object may have beside them is no call.
_BARE_KEYS = frozenset({"name", "parameters", "arguments", "type", "id"})


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """A way to write calls."""

    name: str
    #: What a call begins with.
    markers: tuple[str, ...]
    #: Reads the calls behind a marker, which stands before the given position.
    read: Callable[[Source, int, Found], Reading[None]]
    #: Whether the output may also begin with a call's object, without a marker. Since any JSON may
    #: look like that, the tool must be one that was offered.
    has_bare_calls: bool = False
    #: Whether its marks are special tokens in the model's vocabulary.
    has_special_marks: bool = False
    #: Length of a call's id if the model's template insists on one.
    id_chars: int | None = None


def call_of(found: JsonObject, text: str) -> Call:
    """Return the call that an object means. Raises `MismatchError` if it means none."""
    name = _value(found, text, "name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise MismatchError
    key = "parameters" if "parameters" in found.members else "arguments"
    if key not in found.members:
        return Call(name, "{}")
    start, end = found.members[key]
    raw = text[start:end]
    if raw == "null":
        return Call(name, "{}")
    if raw.startswith('"'):
        raw = with_escapes(json.loads(raw, strict=False))
    return Call(name, arguments_of(raw))


def arguments_of(raw: str) -> str:
    """Return an object's text as strict JSON. Raises `MismatchError` if it is no object."""
    found = JsonObject(0)
    if found.advance(raw) is not Status.DONE or raw[found.pos :].strip():
        raise MismatchError
    if not found.has_control:
        return raw
    try:
        return json.dumps(json.loads(raw, strict=False))
    except ValueError as error:
        # Python reads no numbers of more than 4300 digits.
        raise MismatchError from error


def read_bare(source: Source, at: int, tool_names: frozenset[str], found: Found) -> Reading[None]:
    """Read a call without a marker, and those that follow it."""
    parsed = yield from source.object(at, keys=_BARE_KEYS)
    call = call_of(parsed, source.text)
    if call.name not in tool_names or len(parsed.members) < 2:
        raise MismatchError
    found(call, parsed.pos)
    yield from _read_listed(source, parsed.pos, found)


def _value(found: JsonObject, text: str, key: str) -> object:
    if key not in found.members:
        return None
    start, end = found.members[key]
    return json.loads(text[start:end], strict=False) if text[start] == '"' else None


def _read_hermes(source: Source, at: int, found: Found) -> Reading[None]:
    at = yield from source.space(at)
    parsed = yield from source.object(at)
    found(call_of(parsed, source.text), parsed.pos)
    try:
        at = yield from source.space(parsed.pos)
        closer = yield from source.word(at, "</tool_call>")
        source.pos = at + len(closer)
    except EndedError:
        source.pos = len(source.text)


def _read_llama(source: Source, at: int, found: Found) -> Reading[None]:
    at = yield from source.space(at)
    parsed = yield from source.object(at)
    found(call_of(parsed, source.text), parsed.pos)
    yield from _read_listed(source, parsed.pos, found)


def _read_listed(source: Source, at: int, found: Found) -> Reading[None]:
    """Read more objects, with or without semicolons between them."""
    while True:
        try:
            at = yield from source.space(at)
            if source.text[at] == ";":
                at = yield from source.space(at + 1)
        except EndedError:
            source.pos = len(source.text)
            return
        parsed = yield from source.object(at)
        found(call_of(parsed, source.text), parsed.pos)
        at = parsed.pos


def _read_mistral(source: Source, at: int, found: Found) -> Reading[None]:
    at = yield from source.space(at)
    if source.text[at] == "[":
        yield from _read_array(source, at + 1, found)
    elif source.text[at] == "{":
        parsed = yield from source.object(at)
        found(call_of(parsed, source.text), parsed.pos)
    else:
        yield from _read_named(source, at, found)


def _read_array(source: Source, at: int, found: Found) -> Reading[None]:
    while True:
        at = yield from source.space(at)
        parsed = yield from source.object(at)
        found(call_of(parsed, source.text), parsed.pos)
        at = parsed.pos
        try:
            at = yield from source.space(at)
            mark = yield from source.word(at, ",", "]")
        except EndedError:
            source.pos = len(source.text)
            return
        at += 1
        if mark == "]":
            source.pos = at
            return


def _read_named(source: Source, at: int, found: Found) -> Reading[None]:
    """Read `name[ARGS]{...}`, with `[CALL_ID]` and an id between them in some versions."""
    end = yield from source.name(at)
    name = source.text[at:end]
    mark = yield from source.word(end, "[ARGS]", "[CALL_ID]", "{")
    at = end + len(mark) if mark != "{" else end
    if mark == "[CALL_ID]":
        at = yield from source.name(at)
        yield from source.word(at, "[ARGS]")
        at += len("[ARGS]")
    at = yield from source.space(at)
    parsed = yield from source.object(at)
    found(Call(name, arguments_of(source.text[at : parsed.pos])), parsed.pos)


HERMES = CallSyntax("hermes", ("<tool_call>",), _read_hermes)
LLAMA = CallSyntax(
    "llama", ("<|python_tag|>",), _read_llama, has_bare_calls=True, has_special_marks=True
)
#: Of models that were taught none, where a grammar makes them write it.
BARE = CallSyntax("bare", (), _read_llama, has_bare_calls=True)
MISTRAL = CallSyntax(
    "mistral", ("[TOOL_CALLS]",), _read_mistral, has_special_marks=True, id_chars=9
)
