"""Parts that all APIs share of making messages for a chat template.

Knows nothing of the messages that requests hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from server.generation.generation_spec import PromptMessage
from server.generation.params import Warned, ignored
from server.http.errors import Path, dotted, invalid, shortened
from server.text.template import ChatTemplate
from server.tools.schemas import MAX_CALLS

#: The field of a message that has the reasoning before it.
REASONING = "reasoning_content"
#: Why it has no effect then.
NOT_SHOWN = "the model's template does not use it"
#: More of these in one request, or in one message, are a mistake or an attack.
MAX_MESSAGES = 16_384
MAX_PARTS = 4096
#: Types of parts in OpenAI's and Anthropic's APIs that are not text.
_MEDIA: Mapping[str, str] = {
    "image_url": "images",
    "input_image": "images",
    "image": "images",
    "input_audio": "audio",
    "audio": "audio",
    "audio_url": "audio",
    "video_url": "videos",
    "file": "files",
    "input_file": "files",
    "document": "files",
}


def require_kind(kind: object, known: Iterable[str]) -> None:
    """Raise `ValueError` for a part of a kind that cannot be read, in a sentence for the client."""
    if isinstance(kind, str) and kind not in known:
        shown = repr(shortened(kind))
        if kind in _MEDIA:
            raise ValueError(f"{shown} is not supported: the model reads text, not {_MEDIA[kind]}")
        raise ValueError(f"{shown} is not supported; it can be one of: {', '.join(known)}")


def text_part(text: str) -> dict[str, str]:
    """Return a text as a part of a message's content."""
    return {"type": "text", "text": text}


def content_of(parts: Sequence[dict[str, str]]) -> str | list[dict[str, str]]:
    """Return the content of a message: a string where it is a single text or none."""
    return list(parts) if len(parts) > 1 else "".join(part["text"] for part in parts)


def require_limits(messages: Sequence[PromptMessage], path: Path) -> None:
    """Raise `ApiError` for more messages, or more in one, than a chat may have.

    For the APIs whose messages are not those of a chat; `path`: of their conversation.
    """
    counts = [(path, len(messages), MAX_MESSAGES, "messages")]
    for message in messages:
        calls, content = message.fields.get("tool_calls", ()), message.fields["content"]
        num_parts = len(content) if isinstance(content, list) else 1
        counts += [(message.path, len(calls), MAX_CALLS, "calls")]
        counts += [(message.path, num_parts, MAX_PARTS, "parts")]
    for at, count, limit, what in counts:
        if count > limit:
            raise invalid(f"{dotted(at)}: {count} {what} are more than the {limit} allowed", at)


def unread_reasoning(
    messages: Sequence[PromptMessage], template: ChatTemplate | None
) -> list[Warned]:
    """Return a warning for the first message with reasoning, if the template does not show any."""
    if REASONING in source_of(template):
        return []
    paths = [message.path for message in messages if message.fields.get(REASONING)]
    return [ignored(path, NOT_SHOWN) for path in paths[:1]]


def source_of(template: ChatTemplate | None) -> str:
    """Return all texts of a template."""
    return "" if template is None else "\n".join(template.sources.values())
