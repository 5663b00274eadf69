"""Parts of content, by the kinds that the official clients type: text is read, the rest refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

_TEMPLATE = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
_CHAT, _RESPONSES, _MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
_DATA = "data:image/png;base64,AA=="


def _asked(path: str, *parts: dict[str, Any], role: str = "user") -> dict[str, Any]:
    said = [{"role": role, "content": list(parts)}]
    if path == _RESPONSES:
        return {"input": said}
    return {"messages": said, **({"max_tokens": 9} if path == _MESSAGES else {})}


@pytest.mark.parametrize(
    ("path", "part", "param", "what"),
    [
        (_CHAT, {"type": "image_url", "image_url": {"url": _DATA}}, "messages.0", "images"),
        (_CHAT, {"type": "input_audio", "input_audio": {"data": ""}}, "messages.0", "audio"),
        (_CHAT, {"type": "file", "file": {"file_id": "1"}}, "messages.0", "files"),
        (_CHAT, {"type": "video_url", "video_url": {"url": ""}}, "messages.0", "videos"),
        (_RESPONSES, {"type": "input_image", "image_url": _DATA}, "input.0", "images"),
        (_RESPONSES, {"type": "input_audio", "input_audio": {}}, "input.0", "audio"),
        (_RESPONSES, {"type": "input_file", "file_id": "1"}, "input.0", "files"),
        (_MESSAGES, {"type": "image", "source": {"type": "url"}}, "messages.0", "images"),
        (_MESSAGES, {"type": "document", "source": {}}, "messages.0", "files"),
    ],
)
def test_what_is_not_text_is_refused_in_one_sentence(
    shared: Any, path: str, part: dict[str, Any], param: str, what: str
) -> None:
    text = {"type": "input_text" if path == _RESPONSES else "text", "text": "x"}
    error = shared.post(path, **_asked(path, text, part)).json()["error"]
    field = f"{param}.content.1" + ("" if path == _MESSAGES else ".type")
    kind = part["type"]
    reason = f"{kind!r} is not supported: the model reads text, not {what}"
    assert (error["param"], error["message"]) == (field, f"{field}: {reason}")


@pytest.mark.parametrize(
    ("parts", "shown", "warned"),
    [
        ([{"type": "refusal", "refusal": "no"}], "[assistant:no]", []),
        (
            [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "no"}],
            "[assistant:a\nno]",
            [],
        ),
        (
            [{"type": "text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit"}}],
            "[assistant:a]",
            [],
        ),
        (
            [{"type": "text", "text": "a", "x": 1}, {"type": "text", "text": "b", "x": 1}],
            "[assistant:a\nb]",
            ["messages.0.content.0.x"],
        ),
        ([{"type": "text", "text": "a", "x": None}], "[assistant:a]", []),
    ],
)
def test_a_chats_parts_are_read(
    speaking: Callable[..., Any], parts: list[dict[str, Any]], shown: str, warned: list[str]
) -> None:
    live = speaking("y", template=_TEMPLATE)
    body = live.post(_CHAT, **_asked(_CHAT, *parts, role="assistant")).json()
    assert [warning["param"] for warning in body["octavo"]["warnings"]] == warned
    [request] = live.client.requests
    text = live.text.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
    assert text == shown


@pytest.mark.parametrize(
    ("message", "shown", "warned"),
    [
        ({"role": "assistant", "content": None, "refusal": "no"}, "[assistant:no]", []),
        ({"role": "user", "content": "a", "name": "Al"}, "[user:a]", ["messages.0.name"]),
        (
            {"role": "assistant", "content": "a", "reasoning_content": "b"},
            "[assistant:a]",
            ["messages.0.reasoning_content"],
        ),
        ({"role": "assistant", "content": "a", "annotations": []}, "[assistant:a]", []),
        (
            {"role": "tool", "content": "a", "tool_call_id": "1", "name": "f"},
            "[user:<tool_response>\na\n</tool_response>]",
            [],
        ),
    ],
)
def test_a_messages_fields_are_read_or_warned_of(
    speaking: Callable[..., Any], message: dict[str, Any], shown: str, warned: list[str]
) -> None:
    live = speaking("y", template=_TEMPLATE)
    body = live.post(_CHAT, messages=[message]).json()
    assert [warning["param"] for warning in body["octavo"]["warnings"]] == warned
    [request] = live.client.requests
    text = live.text.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
    assert text == shown


def test_a_part_without_its_words_is_named(shared: Any) -> None:
    error = shared.post(_CHAT, **_asked(_CHAT, {"type": "refusal"})).json()["error"]
    assert error["param"] == "messages.0.content.0"
