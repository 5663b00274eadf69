"""How the families of models write calls: each reads the calls that begin at one place.

A syntax tells calls as it reads them, by a `CallWriter`. It raises `MismatchError` where there is
no (further) call and `EndedError` where the text ends within one. What closes a call may be
missing: models forget it. Knows nothing of the text around calls.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

from server.tools.call_writer import CallWriter
from server.tools.json_object import JsonObject, Status
from server.tools.source import EndedError, MismatchError, Reading, Source

#: Reads the calls behind a marker, which stands before the given position.
Reader = Callable[[Source, int, CallWriter], Reading[None]]

#: A bare object with others beside them is not a call.
_BARE_KEYS = frozenset({"name", "parameters", "arguments", "type", "id"})
_ARGUMENTS_KEYS = ("parameters", "arguments")


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """A way to write calls."""

    name: str
    #: What a call begins with.
    markers: tuple[str, ...]
    read: Reader
    #: Reads calls with which the output begins, without a marker; None: there are none. Since any
    #: text may look like that, the tool must be one that was offered.
    read_bare: Reader | None = None
    #: What a call without a marker begins with.
    bare_openers: str = "{"
    #: Whether its marks are special tokens in the model's vocabulary.
    has_special_marks: bool = False
    #: Whether spaces before and behind calls belong to the text there.
    keeps_spaces: bool = False
    #: Length of a call's id if the model's template insists on one.
    id_chars: int | None = None


def read_arguments(source: Source, at: int, out: CallWriter) -> Reading[int]:
    """Tell the object at `at` as the arguments of the call that has begun; return its end."""
    parsed, told = JsonObject(at), at
    while True:
        status = parsed.advance(source.text)
        out.json(parsed.strict(source.text, told, parsed.known), parsed.known)
        told = parsed.known
        if status is Status.BROKEN:
            raise MismatchError
        if status is Status.DONE:
            return parsed.pos
        yield from source.more()


def read_named(source: Source, at: int, name: str, out: CallWriter) -> Reading[int]:
    """Tell a call whose name is known and whose arguments are at `at`; return their end."""
    at = yield from source.space(at)
    yield from source.word(at, "{")
    out.start(name, at)
    end = yield from read_arguments(source, at, out)
    out.end(end)
    return end


def read_object(
    source: Source, at: int, out: CallWriter, offered: Callable[[str], bool] | None = None
) -> Reading[int]:
    """Tell the call that is an object with its name and its arguments; return its end.

    `offered`: whether there is a tool of this name; given for an object that is a call only if
    there is one, and if it has nothing but a call's keys.
    """
    parsed = JsonObject(at)
    told: int | None = None
    while True:
        status = parsed.advance(source.text)
        if told is None:
            told = _begin_object(parsed, source.text, out, offered)
        if told is not None:
            known = min([parsed.known, *_ends(parsed)])
            out.json(parsed.strict(source.text, told, known), known)
            told = known
        is_foreign = offered is not None and _foreign_at(parsed) < math.inf
        if is_foreign or status is Status.BROKEN:
            raise MismatchError
        if status is Status.DONE:
            break
        yield from source.more()
    if told is None:
        _whole_object(parsed, source.text, out, is_bare=offered is not None)
    out.end(parsed.pos)
    return parsed.pos


def _begin_object(
    parsed: JsonObject, text: str, out: CallWriter, offered: Callable[[str], bool] | None
) -> int | None:
    """Begin the call once its name is known; return where its arguments begin, if they do."""
    start = next(iter(_starts(parsed)), None)
    if start is not None and text[start] not in '{"n':
        raise MismatchError
    if "name" not in parsed.ends:
        return None
    name = _name_of(parsed, text)
    if offered is not None and not offered(name):
        raise MismatchError
    if start is None or text[start] != "{":
        return None
    if offered is not None and _foreign_at(parsed) < max(start, parsed.ends["name"]):
        raise MismatchError
    out.start(name, start)
    return start


def _whole_object(parsed: JsonObject, text: str, out: CallWriter, *, is_bare: bool) -> None:
    """Tell the call that a complete object means, where it has no object of arguments."""
    start, end = next(iter(_starts(parsed)), None), next(iter(_ends(parsed)), None)
    name = _name_of(parsed, text)
    if start is None and is_bare:
        raise MismatchError
    raw = "{}" if start is None else text[start:end]
    if raw == "null":
        raw = "{}"
    elif raw.startswith('"'):
        raw = json.loads(raw, strict=False)
    inner = JsonObject(0)
    if inner.advance(raw) is not Status.DONE or raw[inner.pos :].strip():
        raise MismatchError
    out.start(name, parsed.pos)
    out.json(inner.strict(raw, 0, inner.pos), parsed.pos)


def _foreign_at(parsed: JsonObject) -> float:
    """Return where the first key ends that a call does not have."""
    ends = zip(parsed.keys, parsed.key_ends, strict=True)
    return next((end for key, end in ends if key not in _BARE_KEYS), math.inf)


def _starts(parsed: JsonObject) -> list[int]:
    return [at for key, at in parsed.starts.items() if key in _ARGUMENTS_KEYS]


def _ends(parsed: JsonObject) -> list[int]:
    return [at for key, at in parsed.ends.items() if key in _ARGUMENTS_KEYS]


def _name_of(parsed: JsonObject, text: str) -> str:
    if "name" not in parsed.ends:
        raise MismatchError
    start, end = parsed.starts["name"], parsed.ends["name"]
    if text[start] != '"':
        raise MismatchError
    name: str = json.loads(text[start:end], strict=False)
    return name


def read_bare_object(source: Source, at: int, out: CallWriter) -> Reading[None]:
    """Read a call without a marker, and those that follow it."""
    at = yield from read_object(source, at, out, out.is_offered)
    yield from _read_listed(source, at, out)


def _read_hermes(source: Source, at: int, out: CallWriter) -> Reading[None]:
    at = yield from source.space(at)
    at = yield from read_object(source, at, out)
    yield from read_closer(source, at, "</tool_call>")


def read_closer(source: Source, at: int, *closers: str) -> Reading[None]:
    """Read what closes calls, which may be missing at the output's end."""
    try:
        at = yield from source.space(at)
        closer = yield from source.word(at, *closers)
        source.pos = at + len(closer)
    except EndedError:
        source.pos = len(source.text)


def _read_llama(source: Source, at: int, out: CallWriter) -> Reading[None]:
    at = yield from source.space(at)
    at = yield from read_object(source, at, out)
    yield from _read_listed(source, at, out)


def _read_listed(source: Source, at: int, out: CallWriter) -> Reading[None]:
    """Read more objects, with or without semicolons between them."""
    while True:
        try:
            at = yield from source.space(at)
            if source.text[at] == ";":
                at = yield from source.space(at + 1)
        except EndedError:
            source.pos = len(source.text)
            return
        at = yield from read_object(source, at, out)


def _read_mistral(source: Source, at: int, out: CallWriter) -> Reading[None]:
    at = yield from source.space(at)
    if source.text[at] == "[":
        yield from _read_array(source, at + 1, out)
    elif source.text[at] == "{":
        yield from read_object(source, at, out)
    else:
        yield from _read_mistral_named(source, at, out)


def _read_array(source: Source, at: int, out: CallWriter) -> Reading[None]:
    while True:
        at = yield from source.space(at)
        at = yield from read_object(source, at, out)
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


def _read_mistral_named(source: Source, at: int, out: CallWriter) -> Reading[None]:
    """Read `name[ARGS]{...}`, with `[CALL_ID]` and an id between them in some versions."""
    end = yield from source.name(at)
    name = source.text[at:end]
    mark = yield from source.word(end, "[ARGS]", "[CALL_ID]", "{")
    at = end + len(mark) if mark != "{" else end
    if mark == "[CALL_ID]":
        at = yield from source.name(at)
        yield from source.word(at, "[ARGS]")
        at += len("[ARGS]")
    yield from read_named(source, at, name, out)


HERMES = CallSyntax("hermes", ("<tool_call>",), _read_hermes)
LLAMA = CallSyntax(
    "llama", ("<|python_tag|>",), _read_llama, read_bare=read_bare_object, has_special_marks=True
)
#: Of models that were taught none, where a grammar makes them write it.
BARE = CallSyntax("bare", (), _read_llama, read_bare=read_bare_object)
MISTRAL = CallSyntax(
    "mistral", ("[TOOL_CALLS]",), _read_mistral, has_special_marks=True, id_chars=9
)
