"""Families that write a call's arguments one by one, each as bare text between tags.

What such a text means - a number, an object, or the very letters - the tool's schema says
(`server/tools/typed.py`), or a mark beside it. Text that can be nothing but a string is told as it
is read, any other once it is complete. Knows nothing of the text around calls.
"""

from __future__ import annotations

import html
import json

from server.tools.call_writer import CallWriter
from server.tools.source import Reading, Source, first_of, num_begun
from server.tools.syntaxes import CallSyntax, read_bare_object, read_closer

_FUNCTION, _PARAMETER = "<function=", "<parameter="
_END_PARAMETER, _END_FUNCTION = "</parameter>", "</function>"
_END_CALL = "</tool_call>"
#: DeepSeek's mark, with and without the space that some versions write behind it.
_DSML = ("\uff5cDSML\uff5c", "\uff5cDSML\uff5c ")
_DSML_MARKERS = tuple(
    f"<{_DSML[0]}{name}>" for name in ("function_calls", "tool_calls", " calls", "calls")
)
_SEP = "<|sep|>"
_ARGUMENT, _END_ARGUMENT = '<|open|>argument key="', f"<|close|>argument{_SEP}"
_END_KIMI_CALL = f"<|close|>call{_SEP}"


def _read_value(
    source: Source,
    at: int,
    out: CallWriter,
    key: str,
    closers: tuple[str, ...],
    *,
    is_string: bool | None = None,
) -> Reading[tuple[int, str]]:
    """Tell the member `key` with the text at `at`; return where a closer stands, and which.

    `is_string`: see `typed`.
    """
    is_streamed = out.is_string(key) if is_string is None else is_string
    if not is_streamed or not out.key(key, at):
        end, closer = yield from source.until(at, *closers)
        if not is_streamed:
            out.value(key, source.text[at:end], end, is_string=is_string)
        return end, closer
    out.json('"', at)
    start = at
    while True:
        end, closer = first_of(source.text, start, closers)
        known = end if closer else len(source.text) - num_begun(source.text, start, closers)
        out.json(json.dumps(source.text[start:known], ensure_ascii=False)[1:-1], known)
        start = known
        if closer:
            out.json('"', end)
            return end, closer
        yield from source.more()


def _read_qwen(source: Source, at: int, out: CallWriter) -> Reading[None]:
    """Read `<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>`.

    The first and the last of these tags are at times forgotten, and so is what closes a value.
    """
    if not source.text.endswith(_FUNCTION, 0, at):
        at = yield from source.space(at)
        yield from source.word(at, _FUNCTION)
        at += len(_FUNCTION)
    end = yield from source.name(at)
    yield from source.word(end, ">")
    out.start(source.text[at:end], end + 1)
    at = end + 1
    while True:
        at = yield from source.space(at)
        mark = yield from source.word(at, _PARAMETER, _END_FUNCTION)
        at += len(mark)
        if mark == _END_FUNCTION:
            break
        key_end, _ = yield from source.until(at, ">")
        at = yield from _read_qwen_value(source, key_end + 1, out, source.text[at:key_end])
    out.end_members(at)
    yield from read_closer(source, at, _END_CALL)


def _read_qwen_value(source: Source, at: int, out: CallWriter, key: str) -> Reading[int]:
    """Tell the value at `at`; return where what follows it begins.

    A value that begins on a line of its own ends on one: it may hold tags within its lines.
    """
    if at == len(source.text):
        yield from source.more()
    tags = (_END_PARAMETER, _PARAMETER, _END_FUNCTION)
    lines = tuple("\n" + tag for tag in tags)
    has_margin = source.text[at] == "\n"
    closers = lines if has_margin else lines + tags
    end, closer = yield from _read_value(source, at + has_margin, out, key, closers)
    return end + len(closer) if closer.endswith(_END_PARAMETER) else end


def _read_glm(source: Source, at: int, out: CallWriter) -> Reading[None]:
    """Read `<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...</tool_call>`."""
    end = yield from source.name(at)
    name, is_begun = source.text[at:end], False
    while True:
        at = yield from source.space(end)
        mark = yield from source.word(at, "<arg_key>", _END_CALL)
        at += len(mark)
        if not is_begun:
            out.start(name, at)
            is_begun = True
        if mark == _END_CALL:
            break
        key_end, closer = yield from source.until(at, "</arg_key>")
        key = source.text[at:key_end]
        at = yield from source.space(key_end + len(closer))
        opener = yield from source.word(at, "<arg_value>")
        at += len(opener)
        value_end, closer = yield from _read_value(source, at, out, key, ("</arg_value>",))
        end = value_end + len(closer)
    out.end_members(at)


def _read_dsml(source: Source, at: int, out: CallWriter) -> Reading[None]:
    """Read invocations up to the end of their list; each value says whether it is a string."""
    invoke = [f'<{mark}invoke name="' for mark in _DSML]
    closers = [f"</{marker[1:]}" for marker in _DSML_MARKERS]
    while True:
        at = yield from source.space(at)
        mark = yield from source.word(at, *invoke, *closers)
        at += len(mark)
        if mark in closers:
            source.pos = at
            return
        end = yield from source.name(at)
        mark = yield from source.word(end, '">', '"/>')
        out.start(source.text[at:end], end + len(mark))
        at = end + len(mark)
        if mark == '">':
            at = yield from _read_dsml_values(source, at, out)
        out.end_members(at)


def _read_dsml_values(source: Source, at: int, out: CallWriter) -> Reading[int]:
    parameter = [f'<{mark}parameter name="' for mark in _DSML]
    end_invoke = [f"</{mark}invoke>" for mark in _DSML]
    end_parameter = tuple(f"</{mark}parameter>" for mark in _DSML)
    kinds = {'" string="true">': True, '" string="false">': False}
    while True:
        at = yield from source.space(at)
        mark = yield from source.word(at, *parameter, *end_invoke)
        at += len(mark)
        if mark in end_invoke:
            return at
        key_end, kind = yield from source.until(at, *kinds)
        key = source.text[at:key_end]
        at, closer = yield from _read_value(
            source, key_end + len(kind), out, key, end_parameter, is_string=kinds[kind]
        )
        at += len(closer)


def _read_kimi(source: Source, at: int, out: CallWriter) -> Reading[None]:
    """Read a call of Kimi K3; its tags have attributes, each value says of which type it is.

    A value may spell the tag that ends it, which counts only with another tag behind it.
    """
    end, _ = yield from source.until(at, '"')
    name = html.unescape(source.text[at:end])
    at, _ = yield from source.until(end, _SEP)
    at += len(_SEP)
    out.start(name, at)
    while True:
        at = yield from source.space(at)
        mark = yield from source.word(at, _ARGUMENT, _END_KIMI_CALL)
        at += len(mark)
        if mark == _END_KIMI_CALL:
            out.end_members(at)
            return
        key_end, mark = yield from source.until(at, '" type="')
        key = html.unescape(source.text[at:key_end])
        at = key_end + len(mark)
        kind_end, _ = yield from source.until(at, '"')
        is_string = source.text[at:kind_end] == "string"
        at, _ = yield from source.until(kind_end, _SEP)
        closers = (_END_ARGUMENT + _ARGUMENT, _END_ARGUMENT + _END_KIMI_CALL)
        at, _ = yield from _read_value(
            source, at + len(_SEP), out, key, closers, is_string=is_string
        )
        at += len(_END_ARGUMENT)


#: Where a grammar makes models write calls, they write objects: what is between tags has no form.
QWEN_XML = CallSyntax(
    "qwen3_xml", ("<tool_call>", _FUNCTION), _read_qwen, read_bare=read_bare_object
)
GLM = CallSyntax("glm45", ("<tool_call>",), _read_glm, read_bare=read_bare_object)
DSML = CallSyntax(
    "deepseek_v32",
    _DSML_MARKERS,
    _read_dsml,
    read_bare=read_bare_object,
    has_special_marks=True,
)
KIMI_K3 = CallSyntax(
    "kimi_k3",
    ('<|open|>call tool="',),
    _read_kimi,
    read_bare=read_bare_object,
    has_special_marks=True,
    keeps_spaces=True,
)
