"""DeepSeek's way to write calls, up to V3.1: JSON between special tokens.

Knows nothing of the text around calls.
"""

from __future__ import annotations

import re

from server.tools.events import Call
from server.tools.source import TOOL_NAME, MismatchError, Reading, Source
from server.tools.syntaxes import CallSyntax, Found, arguments_of

_NAME = re.compile(TOOL_NAME)


def _deepseek(word: str) -> str:
    """Spell a mark: the bars are fullwidth, the spaces lower one eighth blocks."""
    return "<\uff5c" + word.replace(" ", "\u2581") + "\uff5c>"


_CALLS, _END_CALLS = _deepseek("tool calls begin"), _deepseek("tool calls end")
_CALL, _END_CALL = _deepseek("tool call begin"), _deepseek("tool call end")
_SEPARATOR = _deepseek("tool sep")
_FENCE, _END_FENCE = "```json", "```"


def _read_deepseek(source: Source, at: int, found: Found) -> Reading[None]:
    """Read calls up to the end of their list, of V3 and R1 as of V3.1.

    The former write `function`, the separator, the name and the arguments in a fence; the latter
    the name, the separator and the arguments.
    """
    while True:
        at = yield from source.space(at)
        mark = yield from source.word(at, _CALL, _END_CALLS)
        at += len(mark)
        if mark == _END_CALLS:
            source.pos = at
            return
        end, _ = yield from source.until(at, _SEPARATOR)
        name, at = source.text[at:end], end + len(_SEPARATOR)
        start = yield from source.space(at)
        is_fenced = source.text[start] != "{"
        if is_fenced:
            end, _ = yield from source.until(at, _FENCE)
            name, start = source.text[at:end], end + len(_FENCE)
        at = yield from _read_object(source, start, name.strip(), found)
        at = yield from source.space(at)
        if is_fenced:
            yield from source.word(at, _END_FENCE)
            at = yield from source.space(at + len(_END_FENCE))
        yield from source.word(at, _END_CALL)
        at += len(_END_CALL)


def _read_object(source: Source, at: int, name: str, found: Found) -> Reading[int]:
    """Tell the call with the arguments at `at`; return where they end."""
    if not _NAME.fullmatch(name):
        raise MismatchError
    at = yield from source.space(at)
    parsed = yield from source.object(at)
    found(Call(name, arguments_of(source.text[at : parsed.pos])), parsed.pos)
    return parsed.pos


DEEPSEEK = CallSyntax("deepseek_v3", (_CALLS,), _read_deepseek, has_special_marks=True)
