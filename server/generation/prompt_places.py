"""Finds the part of a chat that a place in its prompt belongs to.

A template may write a message anywhere. So the conversation is rendered again, with marks around
the content of each message. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from server.generation.generation_spec import Conversation
from server.http.errors import Path
from server.text.quoting import without_marks
from server.text.template import TemplateError

Fields: TypeAlias = dict[str, Any]
#: Renders other messages in place of the conversation's.
Render: TypeAlias = Callable[[list[Fields]], str]

#: Private characters: the start, which has the index of the message, and the end of a content.
_START, _FROM, _END = "\ue002", "\ue003", "\ue004"


class _Piece(NamedTuple):
    """A piece of the prompt; `message`: the index of the one whose content it is."""

    text: str
    message: int | None


def path_at(chat: Conversation, render: Render, head: str) -> Path:
    """Return the field that wrote the first character of the prompt behind its beginning `head`.

    That of the whole conversation where it is unknown, or where the template wrote it.
    """
    marked = [_with_marks(index, one.fields) for index, one in enumerate(chat.messages)]
    try:
        pieces = _pieces(without_marks(render(marked)), len(marked))
    except TemplateError:
        return chat.path
    end, last = 0, -1
    for piece in pieces:
        shown = _shown(piece.text, head, end)
        if shown is None:
            return chat.path
        end += len(shown)
        if end > len(head):
            return _path_of(chat, piece, last)
        last = last if piece.message is None else piece.message
    return chat.path


def _shown(text: str, head: str, start: int) -> str | None:
    """Return a piece as it stands at `start`, where `head` may end within it."""
    rest = head[start : start + len(text)]
    if text.startswith(rest):
        return text
    # A template may trim a text.
    trimmed = (text.lstrip(), text.rstrip(), text.strip())
    return next((one for one in trimmed if one.startswith(head[start : start + len(one)])), None)


def _path_of(chat: Conversation, piece: _Piece, last: int) -> Path:
    """Return the field of a piece behind the content of the message `last`."""
    if piece.message is not None:
        path = chat.messages[piece.message].path
        return (*path, "content") if path[:1] == ("messages",) else path
    if any(tool.name in piece.text for tool in chat.tools) and last < 0:
        return ("tools",)
    if last >= 0 and chat.messages[last].fields.get("tool_calls"):
        return chat.messages[last].path
    return chat.path


def _with_marks(index: int, fields: Mapping[str, Any]) -> Fields:
    start, content = f"{_START}{index}{_FROM}", fields.get("content")
    if isinstance(content, list) and content:
        first, *_ = parts = [dict(part) for part in content]
        first["text"] = start + first["text"]
        parts[-1]["text"] += _END
        return {**fields, "content": parts}
    return {**fields, "content": f"{start}{content or ''}{_END}"}


def _pieces(marked: str, num_messages: int) -> list[_Piece]:
    first, *others = marked.split(_START)
    pieces = [_Piece(first, None)]
    for one in others:
        index, _, rest = one.partition(_FROM)
        content, _, behind = rest.partition(_END)
        # A text may have such characters of its own: then nothing is found.
        if not index.isdecimal() or int(index) >= num_messages:
            return []
        pieces += [_Piece(content, int(index)), _Piece(behind, None)]
    return pieces
