"""Finds the part of a chat that a place in its prompt belongs to.

A template may write a message anywhere. So the conversation is rendered again, with marks around
the content of each message. Knows nothing of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
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
_MARKED = re.compile(f"{_START}([0-9]+){_FROM}(.*?){_END}", re.DOTALL)


class _Piece(NamedTuple):
    """A piece of the prompt; `message`: the index of the one whose content it is."""

    text: str
    message: int | None


def path_at(chat: Conversation, render: Render, prompt: str, place: int) -> Path:
    """Return the field that wrote the character at `place` of the prompt's text.

    That of the whole conversation where it is unknown, or where the template wrote it.
    """
    marked = [_with_marks(index, one.fields) for index, one in enumerate(chat.messages)]
    try:
        pieces = _pieces(without_marks(render(marked)))
    except TemplateError:
        return chat.path
    end, last = 0, -1
    for piece in pieces:
        # A template may trim a text.
        shown = next((t for t in _trimmed(piece.text) if prompt.startswith(t, end)), None)
        if shown is None:
            return chat.path
        end += len(shown)
        if place < end:
            return _path_of(chat, piece, last)
        last = last if piece.message is None else piece.message
    return chat.path


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


def _pieces(marked: str) -> list[_Piece]:
    pieces, end = list[_Piece](), 0
    for found in _MARKED.finditer(marked):
        pieces.append(_Piece(marked[end : found.start()], None))
        pieces.append(_Piece(found[2], int(found[1])))
        end = found.end()
    return [*pieces, _Piece(marked[end:], None)]


def _trimmed(text: str) -> Sequence[str]:
    return (text, text.lstrip(), text.rstrip(), text.strip())
