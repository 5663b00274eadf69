"""How the families of models write calls: each syntax reads the calls that begin at one place.

A syntax reports calls while it reads them, through a `CallWriter`. It raises `MismatchError` where
there is no (further) call and `EndedError` where the text ends within one. The mark that closes a
call may be missing: models leave it out. Knows nothing of the text around calls.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from server.tools.call_writer import CallWriter
from server.tools.json_object import JsonObject, Status
from server.tools.source import EndedError, MismatchError, Reading, Source

#: Reads the calls behind a marker, which stands before the given position.
Reader = Callable[[Source, int, CallWriter], Reading[None]]

#: A bare object with others beside them is not a call.
_BARE_KEYS = frozenset({"name", "parameters", "arguments", "type", "id"})
_ARGUMENTS_KEYS = ("parameters", "arguments")


def _deepseek(word: str) -> str:
    """Write a mark: the bars are fullwidth, the spaces lower one eighth blocks."""
    return "<\uff5c" + word.replace(" ", "\u2581") + "\uff5c>"


_CALLS, _END_CALLS = _deepseek("tool calls begin"), _deepseek("tool calls end")
_CALL, _END_CALL = _deepseek("tool call begin"), _deepseek("tool call end")
_SEPARATOR = _deepseek("tool sep")
_FENCE, _END_FENCE = "```json", "```"
_SECTION, _END_SECTION = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_KIMI_CALL, _END_KIMI_CALL = "<|tool_call_begin|>", "<|tool_call_end|>"
_KIMI_ARGUMENTS = "<|tool_call_argument_begin|>"


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a grammar writes calls: the text around names and arguments, part by part.

    A part may be a special token.
    """

    #: Before the first call of an answer, between two of them, behind the last.
    opening: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    closing: tuple[str, ...] = ()
    #: Of one call.
    before_name: tuple[str, ...] = ('{"name": "',)
    before_arguments: tuple[str, ...] = ('", "arguments": ',)
    after_arguments: tuple[str, ...] = ("}",)


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """A way to write calls."""

    name: str
    #: The texts with which a call begins.
    markers: tuple[str, ...]
    read: Reader
    #: Reads calls without a marker, with which the output begins; None: there are none. Other
    #: text may look the same, so the tool must have been offered.
    read_bare: Reader | None = None
    #: The characters with which a call without a marker begins.
    bare_openers: str = "{"
    #: Whether its marks are special tokens in the model's vocabulary.
    has_special_marks: bool = False
    #: Whether spaces before and behind calls belong to the text there.
    keeps_spaces: bool = False
    #: Length of a call's id if the model's template requires one.
    id_chars: int | None = None
    #: The default is for models whose own calls, if any, do not have arguments in JSON.
    form: CallForm = CallForm(between=("\n",))
    #: A text in the templates of some versions, and their form.
    variant: tuple[str, CallForm] | None = None

    def form_in(self, templates: Mapping[str, str]) -> CallForm:
        """Return the form in which a model with these templates writes calls."""
        if self.variant is not None:
            mark, form = self.variant
            if any(mark in source for source in templates.values()):
                return form
        return self.form


def read_arguments(source: Source, at: int, out: CallWriter) -> Reading[int]:
    """Add the object at `at` as the arguments of the call that has begun; return its end."""
    parsed, done = JsonObject(at), at
    while True:
        status = parsed.advance(source.text)
        out.json(parsed.strict(source.text, done, parsed.known), parsed.known)
        done = parsed.known
        if status is Status.BROKEN:
            raise MismatchError
        if status is Status.DONE:
            return parsed.pos
        yield from source.more()


def read_named(source: Source, at: int, name: str, out: CallWriter) -> Reading[int]:
    """Report a call with this name and the arguments at `at`; return their end."""
    at = yield from source.space(at)
    yield from source.word(at, "{")
    out.start(name, at)
    end = yield from read_arguments(source, at, out)
    out.end(end)
    return end


def read_object(source: Source, at: int, out: CallWriter, *, is_bare: bool = False) -> Reading[int]:
    """Report the call that is an object with a name and arguments; return its end.

    `is_bare`: without a marker; it is a call only if its tool was offered, and if it has no other
    keys than a call's.
    """
    parsed = JsonObject(at)
    done: int | None = None
    while True:
        status = parsed.advance(source.text)
        if done is None:
            done = _begin_object(parsed, source.text, out, is_bare=is_bare)
        if done is not None:
            known = min([parsed.known, *_of_arguments(parsed.ends)])
            out.json(parsed.strict(source.text, done, known), known)
            done = known
        is_foreign = is_bare and _foreign_at(parsed) < math.inf
        if is_foreign or status is Status.BROKEN:
            raise MismatchError
        if status is Status.DONE:
            break
        yield from source.more()
    if done is None:
        _whole_object(parsed, source.text, out, is_bare=is_bare)
    out.end(parsed.pos)
    return parsed.pos


def _begin_object(parsed: JsonObject, text: str, out: CallWriter, *, is_bare: bool) -> int | None:
    """Begin the call once its name is known; return the start of its arguments, if they begin."""
    start = next(iter(_of_arguments(parsed.starts)), None)
    if start is not None and text[start] not in '{"n':
        raise MismatchError
    if "name" not in parsed.ends:
        return None
    name = _name_of(parsed, text)
    if is_bare and not out.is_offered(name):
        raise MismatchError
    if start is None or text[start] != "{":
        return None
    if is_bare and _foreign_at(parsed) < max(start, parsed.ends["name"]):
        raise MismatchError
    out.start(name, start)
    return start


def _whole_object(parsed: JsonObject, text: str, out: CallWriter, *, is_bare: bool) -> None:
    """Report the call of a complete object whose arguments are not an object."""
    starts, ends = _of_arguments(parsed.starts), _of_arguments(parsed.ends)
    name = _name_of(parsed, text)
    if is_bare and not starts:
        raise MismatchError
    raw = text[starts[0] : ends[0]] if starts else "{}"
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
    """Return the end of the first key that a call does not have."""
    ends = zip(parsed.keys, parsed.key_ends, strict=True)
    return next((end for key, end in ends if key not in _BARE_KEYS), math.inf)


def _of_arguments(places: Mapping[str, int]) -> list[int]:
    return [at for key, at in places.items() if key in _ARGUMENTS_KEYS]


def _name_of(parsed: JsonObject, text: str) -> str:
    if "name" not in parsed.ends:
        raise MismatchError
    start, end = parsed.starts["name"], parsed.ends["name"]
    if text[start] != '"':
        raise MismatchError
    name: str = json.loads(text[start:end], strict=False)
    return name


def read_bare_object(source: Source, at: int, out: CallWriter) -> Reading[None]:
    """Read a call without a marker, and further calls behind it."""
    at = yield from read_object(source, at, out, is_bare=True)
    yield from _read_listed(source, at, out)


def _read_hermes(source: Source, at: int, out: CallWriter) -> Reading[None]:
    at = yield from source.space(at)
    at = yield from read_object(source, at, out)
    yield from read_closer(source, at, "</tool_call>")


def read_closer(source: Source, at: int, *closers: str) -> Reading[None]:
    """Read the mark that closes calls, which may be missing at the output's end."""
    source.pos, _ = yield from _skip_or_end(source, at, *closers)


def _skip_or_end(source: Source, at: int, *words: str) -> Reading[tuple[int, str]]:
    """Skip spaces and one of `words`; where the output ends before it, return (its end, "")."""
    try:
        return (yield from source.skip(at, *words))
    except EndedError:
        return len(source.text), ""


def _read_llama(source: Source, at: int, out: CallWriter) -> Reading[None]:
    at = yield from source.space(at)
    at = yield from read_object(source, at, out)
    yield from _read_listed(source, at, out)


def _read_listed(source: Source, at: int, out: CallWriter) -> Reading[None]:
    """Read more objects, with or without semicolons between them."""
    while True:
        at, _ = yield from _skip_or_end(source, at, ";", "")
        at, _ = yield from _skip_or_end(source, at, "")
        if at == len(source.text):
            source.pos = at
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
    mark = ","
    while mark == ",":
        at = yield from source.space(at)
        at = yield from read_object(source, at, out)
        at, mark = yield from _skip_or_end(source, at, ",", "]")
    source.pos = at


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


def _read_deepseek(source: Source, at: int, out: CallWriter) -> Reading[None]:
    """Read calls up to the end of their list.

    V3 and R1 write `function`, the separator, the name and the arguments in a fence. V3.1 writes
    the name, the separator and the arguments.
    """
    while True:
        at, mark = yield from source.skip(at, _CALL, _END_CALLS)
        if mark == _END_CALLS:
            source.pos = at
            return
        name, at, _ = yield from source.until(at, _SEPARATOR)
        start = yield from source.space(at)
        is_fenced = source.text[start] != "{"
        if is_fenced:
            name, start, _ = yield from source.until(at, _FENCE)
        at = yield from read_named(source, start, name.strip(), out)
        if is_fenced:
            at, _ = yield from source.skip(at, _END_FENCE)
        at, _ = yield from source.skip(at, _END_CALL)


def _read_kimi(source: Source, at: int, out: CallWriter) -> Reading[None]:
    """Read calls up to the end of their section; the name is in the id, `functions.NAME:INDEX`.

    Text between the calls of a section is left out.
    """
    while True:
        _, at, mark = yield from source.until(at, _KIMI_CALL, _END_SECTION)
        if mark == _END_SECTION:
            source.pos = at
            return
        called, at, _ = yield from source.until(at, _KIMI_ARGUMENTS)
        name = called.strip().rpartition(":")[0].removeprefix("functions.")
        at = yield from read_named(source, at, name, out)
        at, _ = yield from source.skip(at, _END_KIMI_CALL)


_HERMES = CallForm(
    between=("\n",),
    before_name=("<tool_call>", '\n{"name": "'),
    after_arguments=("}\n", "</tool_call>"),
)
_MISTRAL = CallForm(
    opening=("[TOOL_CALLS]", "["),
    between=(", ",),
    closing=("]",),
)
#: Later versions of the same.
_MISTRAL_NAMED = CallForm(
    before_name=("[TOOL_CALLS]",),
    before_arguments=("[ARGS]",),
    after_arguments=(),
)
_DEEPSEEK = CallForm(
    opening=(_CALLS,),
    closing=(_END_CALLS,),
    before_name=(_CALL,),
    before_arguments=(_SEPARATOR,),
    after_arguments=(_END_CALL,),
)
#: Up to R1.
_DEEPSEEK_FENCED = replace(
    _DEEPSEEK,
    before_name=(_CALL, "function", _SEPARATOR),
    before_arguments=(f"\n{_FENCE}\n",),
    after_arguments=(f"\n{_END_FENCE}", _END_CALL),
)
_KIMI_K2 = CallForm(
    opening=(_SECTION,),
    closing=(_END_SECTION,),
    before_name=(_KIMI_CALL, "functions."),
    # The index belongs to an id, which is ignored.
    before_arguments=(":0", _KIMI_ARGUMENTS),
    after_arguments=(_END_KIMI_CALL,),
)
_LLAMA = CallForm(between=("; ",), before_arguments=('", "parameters": ',))

HERMES = CallSyntax("hermes", ("<tool_call>",), _read_hermes, form=_HERMES)
LLAMA = CallSyntax(
    "llama",
    ("<|python_tag|>",),
    _read_llama,
    read_bare=read_bare_object,
    has_special_marks=True,
    form=_LLAMA,
)
#: For models without a syntax of their own, where a grammar enforces this one.
BARE = CallSyntax("bare", (), _read_llama, read_bare=read_bare_object)
MISTRAL = CallSyntax(
    "mistral",
    ("[TOOL_CALLS]",),
    _read_mistral,
    has_special_marks=True,
    id_chars=9,
    form=_MISTRAL,
    variant=("[ARGS]", _MISTRAL_NAMED),
)
DEEPSEEK = CallSyntax(
    "deepseek_v3",
    (_CALLS,),
    _read_deepseek,
    has_special_marks=True,
    form=_DEEPSEEK,
    variant=(_FENCE, _DEEPSEEK_FENCED),
)
KIMI_K2 = CallSyntax(
    "kimi_k2",
    (_SECTION,),
    _read_kimi,
    has_special_marks=True,
    keeps_spaces=True,
    form=_KIMI_K2,
)
