"""Finds how many tokens of a prompt lie before a breakpoint: the end of a block in a request.

A template may write a block anywhere. So the conversation is rendered again with something else
behind the block: the prompt up to the block is the beginning that both texts share. Knows nothing
of the use of breakpoints.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, takewhile
from typing import Any, TypeAlias

from server.generation.generation_spec import Breakpoint
from server.text.template import SlowTemplateError, TemplateError
from server.text.tokenizer import Tokenizer

Fields: TypeAlias = dict[str, Any]
#: Renders messages and tools.
Render: TypeAlias = Callable[[list[Fields], list[Fields]], str]
Encode: TypeAlias = Callable[[str], list[int]]

#: Private characters, which no text begins with in practice, and a name that templates accept.
_MARK = "\ue000octavo_end\ue001"
_NAME = "octavo_end"


def num_chars_before(
    breakpoint_: Breakpoint,
    text: str,
    messages: Sequence[Fields],
    tools: Sequence[Fields],
    render: Render,
) -> int | None:
    """Return how many characters of the rendered `text` end with the block.

    None where the template does not show the block. Raises `SlowTemplateError`.
    """
    changed = _changed(breakpoint_, messages, tools)
    if changed is None:
        return None
    try:
        other = render(*changed)
    except SlowTemplateError:
        raise
    except TemplateError:
        return None
    return None if other == text else _num_shared(text, other)


def num_tokens_before(
    tokenizer: Tokenizer, text: str, token_ids: list[int], num_chars: int, encode: Encode
) -> int:
    """Return how many of the tokens of `text` lie within its first characters.

    A token that goes on behind them does not count.
    """
    pieces = tokenizer.bytes_by_id(skip_special_tokens=False)
    ends = [*accumulate(len(pieces[token_id]) for token_id in token_ids)]
    data = text.encode(errors="replace")
    if ends and ends[-1] == len(data) and b"".join(pieces[one] for one in token_ids) == data:
        return bisect_right(ends, len(text[:num_chars].encode(errors="replace")))
    # The tokens do not spell the text, as where a normalizer changed it.
    pairs = zip(token_ids, encode(text[:num_chars]), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _changed(
    breakpoint_: Breakpoint, messages: Sequence[Fields], tools: Sequence[Fields]
) -> tuple[list[Fields], list[Fields]] | None:
    """Return messages and tools with something else behind the block."""
    if breakpoint_.tool is not None:
        names = [tool["function"]["name"] for tool in tools]
        if breakpoint_.tool not in names:
            return None
        index = names.index(breakpoint_.tool)
        function = {**tools[index]["function"], "name": _NAME}
        return [*messages], [*tools[: index + 1], {"type": "function", "function": function}]
    shown = [*messages]
    message = shown[breakpoint_.message]
    if breakpoint_.call is not None:
        calls = message["tool_calls"][: breakpoint_.call + 1]
        # The id is one that the template takes.
        last = {**calls[-1], "function": {"name": _NAME, "arguments": "{}"}}
        shown[breakpoint_.message] = {**message, "tool_calls": [*calls, last]}
    else:
        content = _marked(message.get("content"), breakpoint_.part)
        shown[breakpoint_.message] = {**message, "content": content}
    return shown, [*tools]


def _marked(content: str | list[Fields] | None, part: int) -> str | list[Fields]:
    if not isinstance(content, list):
        return (content or "") + _MARK
    parts = [*content]
    parts[part] = {**parts[part], "text": parts[part]["text"] + _MARK}
    return parts


def _num_shared(text: str, other: str) -> int:
    """Count the characters that both begin with: a search that compares slices."""
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if text.startswith(other[:middle]):
            low = middle
        else:
            high = middle - 1
    return low
