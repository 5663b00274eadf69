"""Families that write a call's arguments one by one, each as bare text between tags.

What such a text means - a number, an object, or the very letters - the tool's schema says
(`server/tools/typed.py`), or a mark beside it. Knows nothing of the text around calls.
"""

from __future__ import annotations

from server.tools.events import SpelledCall, SpelledValue
from server.tools.source import EndedError, Reading, Source
from server.tools.syntaxes import CallSyntax, Found

_FUNCTION, _PARAMETER = "<function=", "<parameter="
_END_PARAMETER, _END_FUNCTION = "</parameter>", "</function>"
_END_CALL = "</tool_call>"
#: DeepSeek's mark, with and without the space that some versions write behind it.
_DSML = ("\uff5cDSML\uff5c", "\uff5cDSML\uff5c ")
_DSML_MARKERS = tuple(
    f"<{_DSML[0]}{name}>" for name in ("function_calls", "tool_calls", " calls", "calls")
)


def _read_qwen(source: Source, at: int, found: Found) -> Reading[None]:
    """Read `<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>`.

    The first and the last of these tags are at times forgotten, and so is what closes a value.
    """
    if not source.text.endswith(_FUNCTION, 0, at):
        at = yield from source.space(at)
        yield from source.word(at, _FUNCTION)
        at += len(_FUNCTION)
    end = yield from source.name(at)
    name = source.text[at:end]
    yield from source.word(end, ">")
    at, values = end + 1, []
    while True:
        at = yield from source.space(at)
        mark = yield from source.word(at, _PARAMETER, _END_FUNCTION)
        at += len(mark)
        if mark == _END_FUNCTION:
            break
        key_end, _ = yield from source.until(at, ">")
        key = source.text[at:key_end]
        text, at = yield from _qwen_value(source, key_end + 1)
        values.append(SpelledValue(key, text))
    found(SpelledCall(name, tuple(values)), at)
    yield from _close(source, at)


def _qwen_value(source: Source, at: int) -> Reading[tuple[str, int]]:
    """Return the value at `at` and where what follows it begins.

    A value that begins on a line of its own ends on one: it may hold tags within its lines.
    """
    if at == len(source.text):
        yield from source.more()
    margin = "\n" if source.text[at] == "\n" else ""
    closers = [margin + tag for tag in (_END_PARAMETER, _PARAMETER, _END_FUNCTION)]
    end, closer = yield from source.until(at, *closers)
    text = source.text[at + len(margin) : end]
    after = end + len(closer) if closer.endswith(_END_PARAMETER) else end
    return (text if margin else text.removesuffix("\n")), after


def _read_glm(source: Source, at: int, found: Found) -> Reading[None]:
    """Read `<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...</tool_call>`."""
    end = yield from source.name(at)
    name, values = source.text[at:end], []
    while True:
        at = yield from source.space(end)
        mark = yield from source.word(at, "<arg_key>", _END_CALL)
        at += len(mark)
        if mark == _END_CALL:
            break
        key_end, closer = yield from source.until(at, "</arg_key>")
        key = source.text[at:key_end]
        at = yield from source.space(key_end + len(closer))
        opener = yield from source.word(at, "<arg_value>")
        at += len(opener)
        value_end, closer = yield from source.until(at, "</arg_value>")
        values.append(SpelledValue(key, source.text[at:value_end]))
        end = value_end + len(closer)
    found(SpelledCall(name, tuple(values)), at)


def _read_dsml(source: Source, at: int, found: Found) -> Reading[None]:
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
        name = source.text[at:end]
        mark = yield from source.word(end, '">', '"/>')
        values: list[SpelledValue] = []
        at = end + len(mark)
        if mark == '">':
            values, at = yield from _dsml_values(source, at)
        found(SpelledCall(name, tuple(values)), at)


def _dsml_values(source: Source, at: int) -> Reading[tuple[list[SpelledValue], int]]:
    parameter = [f'<{mark}parameter name="' for mark in _DSML]
    end_invoke = [f"</{mark}invoke>" for mark in _DSML]
    end_parameter = [f"</{mark}parameter>" for mark in _DSML]
    kinds = {'" string="true">': True, '" string="false">': False}
    values: list[SpelledValue] = []
    while True:
        at = yield from source.space(at)
        mark = yield from source.word(at, *parameter, *end_invoke)
        at += len(mark)
        if mark in end_invoke:
            return values, at
        key_end, kind = yield from source.until(at, *kinds)
        key, start = source.text[at:key_end], key_end + len(kind)
        end, closer = yield from source.until(start, *end_parameter)
        values.append(SpelledValue(key, source.text[start:end], is_string=kinds[kind]))
        at = end + len(closer)


def _close(source: Source, at: int) -> Reading[None]:
    try:
        at = yield from source.space(at)
        yield from source.word(at, _END_CALL)
        source.pos = at + len(_END_CALL)
    except EndedError:
        source.pos = len(source.text)


QWEN_XML = CallSyntax("qwen3_xml", ("<tool_call>", _FUNCTION), _read_qwen)
GLM = CallSyntax("glm45", ("<tool_call>",), _read_glm)
DSML = CallSyntax("deepseek_v32", _DSML_MARKERS, _read_dsml, has_special_marks=True)
