"""Families that write JSON between special tokens: DeepSeek up to V3.1, Kimi K2.

Knows nothing of the text around calls.
"""

from __future__ import annotations

from server.tools.call_writer import CallWriter
from server.tools.source import Reading, Source
from server.tools.syntaxes import CallSyntax, read_named


def _deepseek(word: str) -> str:
    """Write a mark: the bars are fullwidth, the spaces lower one eighth blocks."""
    return "<\uff5c" + word.replace(" ", "\u2581") + "\uff5c>"


CALLS, END_CALLS = _deepseek("tool calls begin"), _deepseek("tool calls end")
CALL, END_CALL = _deepseek("tool call begin"), _deepseek("tool call end")
SEPARATOR = _deepseek("tool sep")
FENCE, END_FENCE = "```json", "```"
SECTION, END_SECTION = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
KIMI_CALL, END_KIMI_CALL = "<|tool_call_begin|>", "<|tool_call_end|>"
KIMI_ARGUMENTS = "<|tool_call_argument_begin|>"


def _read_deepseek(source: Source, at: int, out: CallWriter) -> Reading[None]:
    """Read calls up to the end of their list.

    V3 and R1 write `function`, the separator, the name and the arguments in a fence. V3.1 writes
    the name, the separator and the arguments.
    """
    while True:
        at, mark = yield from source.skip(at, CALL, END_CALLS)
        if mark == END_CALLS:
            source.pos = at
            return
        name, at, _ = yield from source.until(at, SEPARATOR)
        start = yield from source.space(at)
        is_fenced = source.text[start] != "{"
        if is_fenced:
            name, start, _ = yield from source.until(at, FENCE)
        at = yield from read_named(source, start, name.strip(), out)
        if is_fenced:
            at, _ = yield from source.skip(at, END_FENCE)
        at, _ = yield from source.skip(at, END_CALL)


def _read_kimi(source: Source, at: int, out: CallWriter) -> Reading[None]:
    """Read calls up to the end of their section; the name is in the id, `functions.NAME:INDEX`.

    Text between the calls of a section is left out.
    """
    while True:
        _, at, mark = yield from source.until(at, KIMI_CALL, END_SECTION)
        if mark == END_SECTION:
            source.pos = at
            return
        called, at, _ = yield from source.until(at, KIMI_ARGUMENTS)
        name = called.strip().rpartition(":")[0].removeprefix("functions.")
        at = yield from read_named(source, at, name, out)
        at, _ = yield from source.skip(at, END_KIMI_CALL)


DEEPSEEK = CallSyntax("deepseek_v3", (CALLS,), _read_deepseek, has_special_marks=True)
KIMI_K2 = CallSyntax("kimi_k2", (SECTION,), _read_kimi, has_special_marks=True, keeps_spaces=True)
