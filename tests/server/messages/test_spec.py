"""The spec of a request of the Messages API, and the paths of its parts."""

from __future__ import annotations

from typing import Any

import pytest

from server.generation.generation_spec import Conversation, ToolUse
from server.generation.request_fields import GenerationSpec
from server.http.errors import ApiError
from server.messages.schemas import CountTokensRequest, MessagesRequest
from server.messages.spec import conversation_of, message_spec

USER: Any = {"role": "user", "content": "1+1?"}
TOOL: Any = {"name": "add", "input_schema": {"type": "object"}, "strict": True}
CALL: Any = {"type": "tool_use", "id": "c1", "name": "add", "input": {}}


def spec_of(**asked: Any) -> GenerationSpec:
    body = {"max_tokens": 9, "messages": [USER], **asked}
    return message_spec(MessagesRequest.model_validate(body), None)


def chat_of(**asked: Any) -> Conversation:
    prompt = spec_of(**asked).prompt
    assert isinstance(prompt, Conversation)
    return prompt


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ({"type": "auto"}, ToolUse("auto")),
        ({"type": "none"}, ToolUse("none")),
        ({"type": "any"}, ToolUse("required")),
        ({"type": "tool", "name": "add"}, ToolUse("required", ("add",), is_named=True)),
    ],
)
@pytest.mark.parametrize("is_single", [None, False, True])
def test_a_choice_of_tools(choice: dict[str, Any], wanted: ToolUse, is_single: bool | None) -> None:
    choice = {**choice, "disable_parallel_tool_use": is_single}
    chat = chat_of(tools=[TOOL], tool_choice=choice)
    assert chat.tool_use == wanted
    assert chat.has_parallel_calls is (None if is_single is None else not is_single)
    [tool] = chat.tools
    assert tool.is_strict


def test_a_format_of_the_output() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    asked = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    told = spec_of(**asked).constraint
    assert told is not None
    assert (told.kind, told.value, told.is_lenient) == ("json", schema, False)
    assert told.path == ("output_config", "format")
    assert told.value_path == ("output_config", "format", "schema")


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"type": "telepathy"}, "output_config.format.type"),
        ({"type": "json_object", "schema": {}}, "output_config.format.schema"),
        ({"type": "json_schema", "schema": 3}, "output_config.format.schema"),
    ],
)
def test_a_wrong_format_is_named_by_its_place(asked: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        spec_of(output_config={"format": asked})
    assert caught.value.param == param
    assert caught.value.message.startswith(param + ": ")


def test_counting_takes_the_same_prompt() -> None:
    asked = {"messages": [USER], "system": "Be kind.", "tools": [TOOL]}
    counted, _ = conversation_of(CountTokensRequest.model_validate(asked), None)
    assert counted == chat_of(**asked)


def test_messages_and_tools_are_found_again_in_the_request() -> None:
    results = [{"type": "tool_result", "tool_use_id": "c1", "content": text} for text in "ab"]
    turns = [
        USER,
        {"role": "assistant", "content": [CALL]},
        {"role": "user", "content": results},
    ]
    left_out = {"type": "web_search_20250305", "name": "web_search"}
    chat = chat_of(system="Be kind.", messages=turns, tools=[left_out, TOOL])
    places = [("system",), ("messages", 0), ("messages", 1), ("messages", 2), ("messages", 2)]
    assert [message.path for message in chat.messages] == places
    [tool] = chat.tools
    assert (tool.path, tool.schema_path) == (("tools", 1), ("tools", 1, "input_schema"))


def test_names_of_our_own_in_warnings() -> None:
    thought = {"type": "thinking", "thinking": "so"}
    turns = [USER, {"role": "assistant", "content": [thought]}]
    told = spec_of(messages=turns, metadata={"user_id": "me"}).warnings
    assert [warning["param"] for warning in told] == ["metadata.user_id", "messages.1"]
    for warning in told:
        assert warning["message"].startswith(warning["param"] + " was ignored: ")


@pytest.mark.parametrize(
    ("turns", "param"),
    [
        ([{"role": "assistant", "content": [CALL] * 1025}, USER], "messages.0"),
        ([USER] * 4097, "messages.0"),
    ],
)
def test_too_much_in_one_message_is_refused(turns: list[Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        spec_of(messages=turns)
    assert caught.value.param == param
