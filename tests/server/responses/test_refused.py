"""What is wrong with a request for a response is named in this API's words."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

import openai
import pytest

from scheduler.client import GenerateRequest, RejectKind, RequestRefusedError, TokenOutput

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "add"}
IMAGE = {"type": "input_image", "image_url": "data:,"}


def message(part: Any) -> dict[str, Any]:
    return {"role": "user", "content": [part]}


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [3]}, "input.0"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"role": "user", "content": 3}]}, "input.0.content"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input.0.type"),
        ({"input": [{"type": {}}]}, "input.0.type"),
        ({"input": [message(IMAGE)]}, "input.0.content.0.type"),
        ({"input": [message({"type": "input_file"})]}, "input.0.content.0.type"),
        ({"input": [message({"type": "input_text"})]}, "input.0.content.0"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.call_id"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id"),
        (
            {"input": [{"type": "function_call_output", "call_id": "x", "output": [IMAGE]}]},
            "input.0.output.0.type",
        ),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.id"),
        ({"input": [{"id": f"msg_{'0' * 48}o0"}]}, "input.0.id"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 500}, "max_output_tokens"),
        ({"max_output_tokens": "many"}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"seed": 2**64}, "seed"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
        ({"include": ["everything"]}, "include.0"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"tools": [{"type": "telepathy"}]}, "tools.0.type"),
        ({"tools": [{"name": "f"}]}, "tools.0.type"),
        (
            {"tools": [{"type": "custom", "name": "f", "format": {"type": "grammar"}}]},
            "tools.0.format",
        ),
        (
            {"tools": [{"type": "namespace", "name": "n", "tools": [TOOL, {"type": "mcp"}]}]},
            "tools.0.tools.1",
        ),
        (
            {"tools": [{"type": "namespace", "name": "n", "tools": [TOOL, TOOL]}]},
            "tools.0.tools.1.name",
        ),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name"),
        ({"tools": [TOOL, TOOL]}, "tools.1.name"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice.mode"),
        (
            {
                "tools": [TOOL],
                "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "x"}]},
            },
            "tool_choice.tools.0",
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "custom", "name": "f"}}, "tool_choice"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"tool_choice": {"type": ["function"]}}, "tool_choice"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"verbosity": "chatty"}}, "text.verbosity"),
        ({"truncation": "maybe"}, "truncation"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"messages": []}, "messages"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"previous_response_id": ""}, "previous_response_id"),
    ],
)
def test_what_is_wrong_is_named(shared: Any, asked: dict[str, Any], param: str) -> None:
    answer = shared.post(PATH, **({"input": "x"} | asked))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert "max_completion_tokens" not in error["message"]


def test_the_official_client_raises(live: Any, api_of: Any) -> None:
    with api_of(live) as api:
        with pytest.raises(openai.BadRequestError) as caught:
            api.responses.create(model="fake", input="x", previous_response_id="resp_1")
        assert caught.value.code == "previous_response_not_found"
        with pytest.raises(openai.NotFoundError) as missing:
            api.responses.create(model="gpt-5", input="x")
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.NotFoundError):
            api.responses.retrieve("resp_1")
        with pytest.raises(openai.NotFoundError):
            api.responses.delete("resp_1")
        with pytest.raises(openai.NotFoundError):
            api.responses.cancel("resp_1")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("?stream=true", "stream"),
        ("?include[]=message.output_text.logprobs", "include[]"),
        ("/input_items?limit=0", "limit"),
        ("/input_items?limit=101", "limit"),
        ("/input_items?limit=x", "limit"),
        ("/input_items?order=up", "order"),
        ("/input_items?after=msg_1", "after"),
        ("/input_items?before=msg_1", "before"),
    ],
)
def test_what_is_wrong_with_a_query_is_named(shared: Any, query: str, param: str) -> None:
    name = shared.post(PATH, input="x", max_output_tokens=1).json()["id"]
    answer = shared.http.get(f"{PATH}/{name}{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_refusal_of_the_engine_is_told_to_the_letter(scripted: Callable[..., Any]) -> None:
    """Its text may quote the request, so no word of it is replaced."""
    told = "the grammar cannot be used: no rule max_tokens for messages"

    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        if request.prompt_token_ids:
            raise RequestRefusedError(told, RejectKind.INVALID, "grammar")
        yield TokenOutput()

    error = scripted(script).post(PATH, input="x", stream=True).json()["error"]
    assert (error["param"], error["message"]) == ("grammar", told)


def test_a_model_whose_template_has_no_tools_refuses_them(
    start_server: Callable[..., Any],
) -> None:
    live = start_server(model={"tools_in_prompt": "off"})
    error = live.post(PATH, input="x", tools=[TOOL]).json()["error"]
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
