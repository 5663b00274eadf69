"""The chat behind a response, and its words."""

from __future__ import annotations

from typing import Any

import pytest

from server.http.errors import ApiError
from server.openai.chat_messages import Message
from server.openai.schemas import ChatRequest, GenerateFields
from server.responses.params import RESPONSES
from server.responses.schemas import WITHOUT_MEANING, ResponsesRequest
from server.responses.translate import Renaming, chat_request, renamed_error


def chat(**asked: Any) -> ChatRequest:
    request = ResponsesRequest.model_validate({"input": "x", **asked})
    return chat_request(request, [Message(role="user", content=None)])


def test_formats_are_a_chats_response_format() -> None:
    schema = {"name": "point", "schema": {"type": "object", "default": None}, "strict": True}
    told = chat(text={"format": {"type": "json_schema", **schema}}).model_dump(by_alias=True)
    wanted = {"description": None, **schema}
    assert told["response_format"] == {"type": "json_schema", "json_schema": wanted}
    told = chat(text={"format": {"type": "json_object"}}).model_dump(exclude_none=True)
    assert told["response_format"] == {"type": "json_object"}
    assert chat(text={"format": {"type": "text"}}).model_dump().get("response_format") is None


def test_tools_and_choices_are_a_chats() -> None:
    parameters = {"type": "object", "properties": {"a": {"default": None}}}
    tool = {"type": "function", "name": "add", "parameters": parameters, "strict": True}
    told = chat(tools=[tool], tool_choice={"type": "function", "name": "add"})
    assert told.tools is not None
    function = told.tools[0].function
    assert (function.name, function.parameters, function.strict) == ("add", parameters, True)
    assert told.model_dump()["tool_choice"]["function"]["name"] == "add"
    assert chat(tools=[tool], tool_choice="required").tool_choice == "required"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.5),
        ("top_k", 3),
        ("min_p", 0.1),
        ("seed", 7),
        ("stop", ["x"]),
        ("logit_bias", {"1": 2.0}),
        ("ignore_eos", True),
        ("cache_salt", "x"),
        ("priority", 3),
        ("truncate_prompt_tokens", 9),
        ("chat_template_kwargs", {"a": 1}),
        ("parallel_tool_calls", False),
        ("include_reasoning", False),
    ],
)
def test_what_all_routes_have_is_passed_on(name: str, value: object) -> None:
    assert getattr(chat(**{name: value}), name) == value


def test_every_field_of_all_routes_is_one_here_too() -> None:
    assert GenerateFields.model_fields.keys() <= ResponsesRequest.model_fields.keys()
    assert ResponsesRequest.model_fields.keys() >= WITHOUT_MEANING.keys()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("messages.1", "input.0"),
        ("messages.1.content.0.text", "input.0"),
        ("messages.0", "instructions"),
        ("messages.7", "input"),
        ("messages", "input"),
        ("max_completion_tokens", "max_output_tokens"),
        ("response_format", "text.format"),
        ("response_format.json_schema.schema.type", "text.format.schema.type"),
        ("tools.3.function.parameters", "tools.3.parameters"),
        ("tools.1.function.parameters", "tools.4.tools.0.parameters"),
        ("tools.0.custom.format.grammar", "tools.1.format"),
        ("tools.3.type", "tools.3.type"),
        ("tool_choice.function.name", "tool_choice.name"),
        ("reasoning_effort", "reasoning.effort"),
        ("verbosity", "text.verbosity"),
        ("top_logprobs", "top_logprobs"),
        ("temperature", "temperature"),
    ],
)
def test_names_are_ours_in_param_and_message(theirs: str, ours: str) -> None:
    told = ApiError(400, f"{theirs}: bad, see {theirs}", param=theirs, code="c", headers={"A": "b"})
    error = renamed_error(
        told, Renaming(["instructions", "input.0"], ["tools.1", "tools.4.tools.0"])
    )
    assert (error.param, error.message) == (ours, f"{ours}: bad, see {ours}")
    assert (error.status, error.code, error.headers) == (400, "c", {"A": "b"})


def test_every_field_of_a_chat_is_taken_or_judged() -> None:
    """A new one must be decided on here too."""
    assert ChatRequest.model_fields.keys() <= ResponsesRequest.model_fields.keys() | RESPONSES
    assert not RESPONSES.keys() & ResponsesRequest.model_fields.keys()
