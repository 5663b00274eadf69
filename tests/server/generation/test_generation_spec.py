"""The three APIs build equal specs of equal requests, and name the parts by their own paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from server.generation.generation_spec import Conversation, ToolUse
from server.generation.request_fields import GenerationSpec
from server.http.errors import ApiError, invalid
from server.messages.schemas import MessagesRequest
from server.messages.spec import message_spec
from server.openai.schemas import ChatRequest
from server.openai.spec import chat_spec
from server.responses.conversation import read_conversation
from server.responses.schemas import ResponsesRequest
from server.responses.spec import response_spec

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
FUNCTION = {"name": "add", "description": "Adds.", "parameters": PARAMETERS, "strict": True}
CALLED = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
FORMAT = {"name": "output", "schema": PARAMETERS, "strict": True}

CHAT = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "So:", "reasoning_content": "so", "tool_calls": [CALLED]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ],
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "response_format": {"type": "json_schema", "json_schema": FORMAT},
    "max_completion_tokens": 9,
    "temperature": 0.5,
    "min_p": 0.1,
}
MESSAGES = {
    "system": "Be kind.",
    "messages": [
        {"role": "user", "content": "1+1?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "so"},
                {"type": "text", "text": "So:"},
                {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "2"}],
        },
    ],
    "tools": [
        {"name": "add", "description": "Adds.", "input_schema": PARAMETERS, "strict": True},
    ],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    "output_config": {"format": {"type": "json_schema", "schema": PARAMETERS}},
    "max_tokens": 9,
    "temperature": 0.5,
    "min_p": 0.1,
}
RESPONSES = {
    "instructions": "Be kind.",
    "input": [
        {"role": "user", "content": "1+1?"},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "so"}]},
        {"role": "assistant", "content": "So:"},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "2"},
    ],
    "tools": [{"type": "function", **FUNCTION}],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "text": {"format": {"type": "json_schema", **FORMAT}},
    "max_output_tokens": 9,
    "temperature": 0.5,
    "min_p": 0.1,
}


def of_chat(**more: Any) -> GenerationSpec:
    return chat_spec(ChatRequest.model_validate(CHAT | more), None)


def of_messages(**more: Any) -> GenerationSpec:
    return message_spec(MessagesRequest.model_validate(MESSAGES | more), None)


def of_responses(**more: Any) -> GenerationSpec:
    request = ResponsesRequest.model_validate(RESPONSES | more)
    read = read_conversation(
        "key",
        request.input,
        instructions=request.instructions,
        previous=None,
        references={},
        limit_bytes=1,
    )
    return response_spec(request, read.messages, read.warnings, None, 1)


def conversation(spec: GenerationSpec) -> Conversation:
    assert isinstance(spec.prompt, Conversation)
    return spec.prompt


def in_common(spec: GenerationSpec) -> Mapping[str, object]:
    chat, constraint = conversation(spec), spec.constraint
    assert constraint is not None
    # Messages alone repeats the name of the tool in its result, for the templates that show it.
    messages = [{k: v for k, v in one.fields.items() if k != "name"} for one in chat.messages]
    return {
        "messages": messages,
        "tools": [(tool.for_template(), tool.is_strict) for tool in chat.tools],
        "tool_use": (chat.tool_use, chat.has_parallel_calls),
        "constraint": (constraint.kind, constraint.value, constraint.is_lenient),
        "sampling": spec.fields.sampling(),
        "limit": spec.fields.max_tokens,
    }


def test_equal_requests_are_equal_specs() -> None:
    wanted = in_common(of_chat())
    assert in_common(of_messages()) == wanted
    assert in_common(of_responses()) == wanted
    assert wanted["tool_use"] == (ToolUse("required"), False)


def test_each_api_names_the_parts_by_its_own_paths() -> None:
    specs = (of_chat(), of_messages(), of_responses())
    paths = [[message.path for message in conversation(spec).messages] for spec in specs]
    assert paths[0] == [("messages", i) for i in range(4)]
    assert paths[1] == [("system",), *(("messages", i) for i in range(3))]
    assert paths[2] == [("instructions",), ("input", 0), ("input", 1), ("input", 4)]
    schemas = [conversation(spec).tools[0].schema_path for spec in specs]
    assert schemas == [
        ("tools", 0, "function", "parameters"),
        ("tools", 0, "input_schema"),
        ("tools", 0, "parameters"),
    ]
    constraints = [spec.constraint.value_path for spec in specs if spec.constraint is not None]
    assert constraints == [
        ("response_format", "json_schema", "schema"),
        ("output_config", "format", "schema"),
        ("text", "format", "schema"),
    ]
    limits = [spec.max_tokens_path for spec in specs]
    assert limits == [("max_completion_tokens",), ("max_tokens",), ("max_output_tokens",)]


@pytest.mark.parametrize(
    ("path", "param"),
    [
        (None, None),
        ((), None),
        ("seed", "seed"),
        (("input", 0, "content", 1), "input.0.content.1"),
        (("x" * 300,), "x" * 200 + "…"),
    ],
)
def test_a_path_is_written_with_dots(path: Any, param: str | None) -> None:
    error = invalid("is wrong", path)
    assert isinstance(error, ApiError)
    assert error.param == param


@pytest.mark.parametrize(
    ("url", "asked", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "messages.0"),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3},
            "messages.0",
        ),
        ("/v1/responses", {"input": "x"}, "input.0"),
    ],
)
def test_the_words_of_a_template_are_told_to_the_letter_and_not_logged(
    speaking: Callable[..., Any], url: str, asked: dict[str, Any], param: str
) -> None:
    """They may have names of fields in them, which are not those of the request."""
    told = "only messages, logprobs and max_tokens of role"
    source = "{% for m in messages %}{{ raise_exception('" + told + " ' ~ m.role) }}{% endfor %}"
    live = speaking("x", template=source)
    error = live.post(url, **asked).json()["error"]
    assert (error["param"], error["message"]) == (param, told + " user")
    [line] = live.log_lines()
    assert line["reason"] == "the chat template, or a limit on it, refuses the messages"
