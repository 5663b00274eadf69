"""The spec of a request of the Responses API, and the paths of its parts."""

from __future__ import annotations

from typing import Any

import pytest

from server.generation.generation_spec import Conversation, PromptMessage, ToolUse
from server.generation.request_fields import GenerateFields, GenerationSpec
from server.http.errors import ApiError
from server.openai.schemas import ChatRequest
from server.responses.conversation import read_conversation
from server.responses.params import RESPONSES
from server.responses.schemas import WITHOUT_MEANING, ResponsesRequest
from server.responses.spec import response_spec

FUNCTION: Any = {"type": "function", "name": "add", "parameters": {"type": "object"}}


def spec_of(**asked: Any) -> GenerationSpec:
    request = ResponsesRequest.model_validate({"input": "x", **asked})
    message = PromptMessage({"role": "user", "content": "x"}, ("input", 0))
    return response_spec(request, [message], [], None, 1)


def chat_of(**asked: Any) -> Conversation:
    prompt = spec_of(**asked).prompt
    assert isinstance(prompt, Conversation)
    return prompt


def test_formats() -> None:
    schema = {"name": "point", "schema": {"type": "object", "default": None}, "strict": True}
    told = spec_of(text={"format": {"type": "json_schema", **schema}}).constraint
    assert told is not None
    assert (told.kind, told.value, told.is_lenient) == ("json", schema["schema"], False)
    assert (told.path, told.value_path) == (("text", "format"), ("text", "format", "schema"))
    told = spec_of(text={"format": {"type": "json_object"}}).constraint
    assert told is not None
    assert (told.kind, told.value, told.path) == ("json", {"type": "object"}, ("text", "format"))
    assert spec_of(text={"format": {"type": "text"}}).constraint is None


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"type": "json_schema"}, "text.format.name"),
        ({"type": "json_schema", "name": "a b", "schema": {}}, "text.format.name"),
        ({"type": "json_schema", "name": "a", "schema": 3}, "text.format.schema"),
        ({"type": "json_object", "name": "a"}, "text.format.name"),
    ],
)
def test_a_wrong_format_is_named_by_its_place(asked: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        spec_of(text={"format": asked})
    assert caught.value.param == param
    assert caught.value.message.startswith(param + ": ")


def test_two_forms_are_named_by_their_places() -> None:
    with pytest.raises(ApiError) as caught:
        spec_of(text={"format": {"type": "json_object"}}, guided_regex="a")
    assert caught.value.param == "guided_regex"
    assert caught.value.message == "text.format and guided_regex exclude each other"


def test_tools_and_choices() -> None:
    parameters = {"type": "object", "properties": {"a": {"default": None}}}
    tool = {"type": "function", "name": "add", "parameters": parameters, "strict": True}
    told = chat_of(tools=[tool], tool_choice={"type": "function", "name": "add"})
    [function] = told.tools
    assert (function.name, function.parameters, function.is_strict) == ("add", parameters, True)
    assert told.tool_use == ToolUse("required", ("add",), is_named=True)
    assert chat_of(tools=[tool], tool_choice="required").tool_use == ToolUse("required")
    assert chat_of(tool_choice="auto").tool_use is None


def test_tools_are_found_again_in_the_request() -> None:
    regex = {"type": "grammar", "syntax": "regex", "definition": "a"}
    custom = {"type": "custom", "name": "c", "format": regex}
    namespace = {"type": "namespace", "name": "n", "tools": [FUNCTION]}
    tools = chat_of(tools=[{"type": "web_search"}, custom, namespace]).tools
    assert [tool.name for tool in tools] == ["c", "n__add"]
    assert [tool.path for tool in tools] == [("tools", 1), ("tools", 2, "tools", 0)]
    assert tools[0].schema_path == ("tools", 1, "format")
    assert tools[1].schema_path == ("tools", 2, "tools", 0, "parameters")


def test_a_name_that_is_too_long_with_its_namespace_is_named_by_its_place() -> None:
    namespace = {"type": "namespace", "name": "n" * 99, "tools": [FUNCTION | {"name": "a" * 99}]}
    with pytest.raises(ApiError) as caught:
        spec_of(tools=[namespace])
    assert caught.value.param == "tools.0.tools.0.name"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.5),
        ("top_k", 3),
        ("min_p", 0.1),
        ("seed", 7),
        ("logit_bias", {"1": 2.0}),
        ("ignore_eos", True),
        ("stop", ["x"]),
        ("cache_salt", "x"),
        ("priority", 3),
        ("truncate_prompt_tokens", 9),
    ],
)
def test_what_all_routes_have_is_asked_for(name: str, value: object) -> None:
    fields = spec_of(**{name: value}).fields
    assert getattr(fields, name) == value
    assert fields.sampling().get(name, value) == value


def test_fields_of_other_names() -> None:
    chat = chat_of(
        chat_template_kwargs={"a": 1},
        parallel_tool_calls=False,
        include_reasoning=False,
        reasoning={"effort": "low"},
    )
    assert chat.variables == {"a": 1}
    assert (chat.has_parallel_calls, chat.has_reasoning) == (False, False)
    assert (chat.reasoning_effort, chat.effort_path) == ("low", ("reasoning", "effort"))
    spec = spec_of(max_output_tokens=7, truncation="auto", text={"verbosity": "low"})
    assert (spec.fields.max_tokens, spec.max_tokens_path) == (7, ("max_output_tokens",))
    assert spec.fields.truncate_prompt_tokens == -1
    assert [warning["param"] for warning in spec.warnings] == ["text.verbosity"]


def test_every_field_of_all_routes_is_one_here_too() -> None:
    assert GenerateFields.model_fields.keys() <= ResponsesRequest.model_fields.keys()
    assert ResponsesRequest.model_fields.keys() >= WITHOUT_MEANING.keys()


def test_every_field_of_a_chat_is_taken_or_judged() -> None:
    """A new one must be decided on here too."""
    assert ChatRequest.model_fields.keys() <= ResponsesRequest.model_fields.keys() | RESPONSES
    assert not RESPONSES.keys() & ResponsesRequest.model_fields.keys()


def test_too_many_calls_in_one_message_are_refused() -> None:
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    items = ResponsesRequest.model_validate({"input": [call] * 1025}).input
    with pytest.raises(ApiError) as caught:
        read_conversation(
            "key", items, instructions=None, previous=None, references={}, limit_bytes=1
        )
    assert caught.value.param == "input.0"
