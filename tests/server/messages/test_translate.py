"""What a request becomes as a chat, and under which names one hears of the chat's faults."""

from __future__ import annotations

from typing import Any

import pytest

from server.http.errors import invalid
from server.messages.schemas import CountTokensRequest, MessagesRequest
from server.messages.translate import Translated, translate

USER: Any = {"role": "user", "content": "1+1?"}
TOOL: Any = {"name": "add", "input_schema": {"type": "object"}, "strict": True}


def translated(**asked: Any) -> Translated:
    body = {"max_tokens": 9, "messages": [USER], **asked}
    return translate(MessagesRequest.model_validate(body), None)


@pytest.mark.parametrize(
    ("choice", "chats"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "add"}, {"type": "function", "function": {"name": "add"}}),
    ],
)
@pytest.mark.parametrize("is_single", [None, False, True])
def test_a_choice_of_tools_is_the_chats(
    choice: dict[str, Any], chats: object, is_single: bool | None
) -> None:
    choice = {**choice, "disable_parallel_tool_use": is_single}
    chat = translated(tools=[TOOL], tool_choice=choice).chat.model_dump()
    assert chat["tool_choice"] == chats
    assert chat.get("parallel_tool_calls") is (None if is_single is None else not is_single)
    [tool] = chat["tools"]
    assert tool["function"]["strict"] is True


def test_a_format_of_the_output_is_the_chats() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    asked = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    told = translated(**asked).chat.model_dump(by_alias=True)["response_format"]
    assert told["type"] == "json_schema"
    assert told["json_schema"]["schema"] == schema


def test_counting_takes_the_same_prompt() -> None:
    asked = {"messages": [USER], "system": "Be kind.", "tools": [TOOL]}
    counted = translate(CountTokensRequest.model_validate(asked), None).chat
    assert counted.messages == translated(**asked).chat.messages
    assert counted.tools == translated(**asked).chat.tools


@pytest.mark.parametrize(
    ("param", "name"),
    [
        (None, None),
        ("messages", "messages"),
        ("messages.0", "system"),
        ("messages.1.content.0", "messages.0"),
        ("messages.4", "messages.2"),
        ("messages.9", "messages"),
        ("tools.3.function.parameters.type", "tools.3.input_schema.type"),
        ("tools.0.function.strict", "tools.0.strict"),
        ("tools", "tools"),
        ("stop.1", "stop_sequences.1"),
        ("user", "metadata.user_id"),
        ("response_format", "output_config.format"),
        ("response_format.json_schema.schema", "output_config.format.schema"),
        ("parallel_tool_calls", "tool_choice.disable_parallel_tool_use"),
        ("max_tokens", "max_tokens"),
        ("Odd name", "Odd name"),
    ],
)
def test_a_fault_of_the_chat_is_told_by_the_requests_names(
    param: str | None, name: str | None
) -> None:
    call = {"type": "tool_use", "id": "c1", "name": "add", "input": {}}
    results = [{"type": "tool_result", "tool_use_id": "c1", "content": text} for text in "ab"]
    turns = [
        USER,
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": results},
    ]
    about = translated(system="Be kind.", messages=turns)
    error = about.error(invalid(f"{param} is wrong", param, "some_code"))
    assert (error.status, error.param, error.code) == (400, name, "some_code")
    assert error.message == f"{name} is wrong"
    if param is not None and name is not None:
        [warning] = about.all_warnings([{"param": param, "message": f"{param} is wrong"}])
        assert warning == {"param": name, "message": f"{name} is wrong"}
