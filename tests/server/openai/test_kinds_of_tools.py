"""Every kind of tool, choice and item that the official SDKs type is served or named.

Their unions are walked, so a new version with a new kind shows here.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from anthropic.types import tool_choice_param as messages_choice
from anthropic.types import tool_union_param
from anthropic.types.beta import beta_tool_union_param
from openai.types.chat import (
    chat_completion_tool_choice_option_param,
    chat_completion_tool_union_param,
)
from openai.types.responses import response_create_params, response_input_item_param, tool_param
from typing_extensions import get_type_hints, is_typeddict

TEMPLATE = "{% if tools %}<tool_call>{{ tools | length }}{% endif %}{{ messages[0].content }}"
USER = {"role": "user", "content": "x"}
FORMAT = {"type": "grammar", "syntax": "regex", "definition": "a+"}
FUNCTION = {"type": "function", "name": "f", "parameters": {}, "strict": False}
CUSTOM = {"type": "custom", "name": "c", "format": FORMAT}
#: The served kinds, by type; an answer must name all others.
RESPONSE_TOOLS: dict[str, Any] = {
    "function": FUNCTION,
    "custom": CUSTOM,
    "namespace": {
        "type": "namespace",
        "name": "n",
        "description": "N",
        "tools": [FUNCTION, CUSTOM],
    },
}
RESPONSE_CHOICES: dict[str, Any] = {
    "function": {"type": "function", "name": "f"},
    "custom": {"type": "custom", "name": "c"},
    "allowed_tools": {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "f"}, {"type": "image_generation"}],
    },
}
RESPONSE_ITEMS: dict[str, Any] = {
    "message": {"type": "message", "role": "user", "content": "x"},
    "function_call": {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
    "function_call_output": {"type": "function_call_output", "call_id": "a", "output": "x"},
    "custom_tool_call": {"type": "custom_tool_call", "call_id": "a", "name": "c", "input": "x"},
    "custom_tool_call_output": {"type": "custom_tool_call_output", "call_id": "a", "output": "x"},
    "reasoning": {"type": "reasoning", "id": "rs_1", "summary": []},
}
CHAT_TOOLS: dict[str, Any] = {
    "function": {"type": "function", "function": {"name": "f"}},
    "custom": {"type": "custom", "custom": {"name": "c"}},
}
CHAT_CHOICES: dict[str, Any] = {
    **CHAT_TOOLS,
    "allowed_tools": {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [CHAT_TOOLS["custom"]]},
    },
}
MESSAGE_TOOLS: dict[str, Any] = {"custom": {"name": "f", "input_schema": {"type": "object"}}}
MESSAGE_CHOICES: dict[str, Any] = {
    "auto": {"type": "auto"},
    "any": {"type": "any"},
    "none": {"type": "none"},
    "tool": {"type": "tool", "name": "f"},
}


def _kinds(union: Any) -> list[str]:
    """Return the values of `type` in a union of dictionaries."""
    return sorted(set(_walked(union)))


def _walked(union: Any) -> Iterator[str]:
    if not is_typeddict(union):
        for one in typing.get_args(union):
            yield from _walked(one)
        return
    kind = get_type_hints(union).get("type")
    yield from _texts(kind)


def _texts(hint: Any) -> Iterator[str]:
    if typing.get_origin(hint) is Literal:
        yield from (one for one in typing.get_args(hint) if isinstance(one, str))
    else:
        for one in typing.get_args(hint):
            yield from _texts(one)


@pytest.fixture(scope="module")
def kinds() -> dict[str, list[str]]:
    found = {
        "response tools": _kinds(tool_param.ToolParam),
        "response choices": _kinds(response_create_params.ToolChoice),
        "response items": _kinds(response_input_item_param.ResponseInputItemParam),
        "chat tools": _kinds(chat_completion_tool_union_param.ChatCompletionToolUnionParam),
        "chat choices": _kinds(
            chat_completion_tool_choice_option_param.ChatCompletionToolChoiceOptionParam
        ),
        "message tools": _kinds(tool_union_param.ToolUnionParam),
        "beta message tools": _kinds(beta_tool_union_param.BetaToolUnionParam),
        "message choices": _kinds(messages_choice.ToolChoiceParam),
    }
    assert all(len(some) > 1 for some in found.values()), found
    return found


@pytest.fixture
def live(speaking: Any) -> Any:
    return speaking("x", template=TEMPLATE)


def _is_named(answer: Any, kind: str) -> bool:
    """Return whether a sentence of the answer, a warning or an error, names the tool."""
    if answer.status_code == 200:
        messages = [warning["message"] for warning in answer.json()["octavo"]["warnings"]]
        return any(kind in one for one in messages)
    assert answer.status_code == 400, answer.text
    return kind in answer.json()["error"]["message"]


def test_tools_of_responses(live: Any, kinds: dict[str, list[str]]) -> None:
    for kind in kinds["response tools"]:
        tools = [RESPONSE_TOOLS.get(kind, {"type": kind}), {**FUNCTION, "name": "other"}]
        answer = live.post("/v1/responses", input="x", tools=tools)
        assert answer.status_code == 200, answer.text
        assert (kind in RESPONSE_TOOLS) != _is_named(answer, f"({kind})"), answer.text


def test_choices_of_responses(live: Any, kinds: dict[str, list[str]]) -> None:
    for kind in kinds["response choices"]:
        choice = RESPONSE_CHOICES.get(kind, {"type": kind, "server_label": "s"})
        answer = live.post("/v1/responses", input="x", tools=[FUNCTION, CUSTOM], tool_choice=choice)
        if kind in RESPONSE_CHOICES:
            assert answer.status_code == 200, answer.text
        else:
            assert answer.status_code == 400
            assert _is_named(answer, kind), answer.text


def test_items_of_responses(live: Any, kinds: dict[str, list[str]]) -> None:
    for kind in kinds["response items"]:
        if kind == "item_reference":
            continue
        items = [{"role": "user", "content": "x"}, RESPONSE_ITEMS.get(kind, {"type": kind})]
        answer = live.post("/v1/responses", input=items)
        if kind in RESPONSE_ITEMS:
            assert answer.status_code == 200, answer.text
        else:
            assert answer.status_code == 400
            assert _is_named(answer, kind), answer.text


def test_tools_and_choices_of_chats(live: Any, kinds: dict[str, list[str]]) -> None:
    assert kinds["chat tools"] == sorted(CHAT_TOOLS)
    assert kinds["chat choices"] == sorted(CHAT_CHOICES)
    for choice in CHAT_CHOICES.values():
        asked = {"tools": list(CHAT_TOOLS.values()), "tool_choice": choice}
        answer = live.post("/v1/chat/completions", messages=[USER], **asked)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("union", ["message tools", "beta message tools"])
def test_tools_of_messages(live: Any, kinds: dict[str, list[str]], union: str) -> None:
    for kind in kinds[union]:
        tool = MESSAGE_TOOLS.get(kind, {"type": kind, "name": "n"})
        tools = [tool, {**MESSAGE_TOOLS["custom"], "name": "other"}]
        answer = live.post("/v1/messages", messages=[USER], max_tokens=9, tools=tools)
        assert answer.status_code == 200, (kind, answer.text)
        assert (kind in MESSAGE_TOOLS) != _is_named(answer, f"({kind})"), answer.text


def test_choices_of_messages(live: Any, kinds: dict[str, list[str]]) -> None:
    assert kinds["message choices"] == sorted(MESSAGE_CHOICES)
    for choice in MESSAGE_CHOICES.values():
        asked = {"tools": [MESSAGE_TOOLS["custom"]], "tool_choice": choice}
        answer = live.post("/v1/messages", messages=[USER], max_tokens=9, **asked)
        assert answer.status_code == 200, answer.text
