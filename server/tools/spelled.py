"""Families that write a call's arguments one by one, each as bare text between tags.

The tool's schema (`server/tools/typed.py`) or a mark beside the text states whether it is a string,
a number or an object. Text that can only be a string is reported while it is read, any other once
it is complete. Knows nothing of the text around calls.
"""

from __future__ import annotations

import html

from server.tools.call_writer import CallWriter
from server.tools.source import Reading, Source
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
    """Add the member `key` with the text at `at`; return the position of a closer, and the closer.

    `is_string`: see `typed`.
    """
    is_streamed = out.is_string(key) if is_string is None else is_string
    if is_streamed and out.key(key, at):
        out.json('"', at)
        end, closer = yield from out.characters(at, *closers)
        out.json('"', end)
        return end, closer
    text, end, closer = yield from source.until(at, *closers)
    end -= len(closer)
    if not is_streamed:
        out.value(key, text, end, is_string=is_string)
    return end, closer


def _read_qwen(source: Source, at: int, out: CallWriter) -> Reading[None]:
    """Read `<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>`.

    Models sometimes leave out the first and the last of these tags, and the one that ends a value.
    """
    if not source.text.endswith(_FUNCTION, 0, at):
        at, _ = yield from source.skip(at, _FUNCTION)
    end = yield from source.name(at)
    yield from source.word(end, ">")
    out.start(source.text[at:end], end + 1)
    at = end + 1
    while True:
        at, mark = yield from source.skip(at, _PARAMETER, _END_FUNCTION)
        if mark == _END_FUNCTION:
            break
        key, at, _ = yield from source.until(at, ">")
        at = yield from _read_qwen_value(source, at, out, key)
    out.end_members(at)
    yield from read_closer(source, at, _END_CALL)


def _read_qwen_value(source: Source, at: int, out: CallWriter, key: str) -> Reading[int]:
    """Add the value at `at`; return the position behind it.

    A value that begins on a line of its own ends on one: its lines may contain tags.
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
        at, mark = yield from source.skip(end, "<arg_key>", _END_CALL)
        if not is_begun:
            out.start(name, at)
            is_begun = True
        if mark == _END_CALL:
            break
        key, at, _ = yield from source.until(at, "</arg_key>")
        at, _ = yield from source.skip(at, "<arg_value>")
        value_end, closer = yield from _read_value(source, at, out, key, ("</arg_value>",))
        end = value_end + len(closer)
    out.end_members(at)


def _read_dsml(source: Source, at: int, out: CallWriter) -> Reading[None]:
    """Read invocations up to the end of their list; each value is marked as a string or not."""
    invoke = [f'<{mark}invoke name="' for mark in _DSML]
    closers = [f"</{marker[1:]}" for marker in _DSML_MARKERS]
    while True:
        at, mark = yield from source.skip(at, *invoke, *closers)
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
        at, mark = yield from source.skip(at, *parameter, *end_invoke)
        if mark in end_invoke:
            return at
        key, at, kind = yield from source.until(at, *kinds)
        at, closer = yield from _read_value(
            source, at, out, key, end_parameter, is_string=kinds[kind]
        )
        at += len(closer)


def _read_kimi(source: Source, at: int, out: CallWriter) -> Reading[None]:
    """Read a call of Kimi K3; its tags have attributes, and each value has its type.

    A value may contain the tag that ends it, which counts only with another tag behind it.
    """
    name, at, _ = yield from source.until(at, '"')
    _, at, _ = yield from source.until(at, _SEP)
    out.start(html.unescape(name), at)
    while True:
        at, mark = yield from source.skip(at, _ARGUMENT, _END_KIMI_CALL)
        if mark == _END_KIMI_CALL:
            out.end_members(at)
            return
        key, at, _ = yield from source.until(at, '" type="')
        kind, at, _ = yield from source.until(at, '"')
        _, at, _ = yield from source.until(at, _SEP)
        closers = (_END_ARGUMENT + _ARGUMENT, _END_ARGUMENT + _END_KIMI_CALL)
        at, _ = yield from _read_value(
            source, at, out, html.unescape(key), closers, is_string=kind == "string"
        )
        at += len(_END_ARGUMENT)


#: Calls that a grammar enforces are objects: the text between tags has no form.
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
