"""Errors of the Messages routes: Anthropic's shape, and fields by the names the client gave."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import anthropic
import httpx
import pytest
from pydantic import TypeAdapter

from scheduler.client import GenerateRequest, RejectKind, RequestRefusedError, TokenOutput
from server.generation.prompt_messages import MAX_MESSAGES, MAX_PARTS
from server.messages.response_models import MessagesErrorBody
from server.tools.schemas import MAX_TOOLS

USER: Any = {"role": "user", "content": "1+1?"}
TOOL: Any = {"name": "add", "input_schema": {"type": "object"}}
IMAGE: Any = {"type": "image", "source": {"type": "url", "url": "x"}}
CALL: Any = {"type": "tool_use", "id": "c1", "name": "add", "input": {}}
RESULT: Any = {"type": "tool_result", "tool_use_id": "c1", "content": "2"}
ASKED: dict[str, Any] = {"max_tokens": 9, "messages": [USER]}
PATHS = ["/v1/messages", "/v1/messages/count_tokens"]


def error_of(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    TypeAdapter(MessagesErrorBody).validate_python(body)
    assert body["request_id"] == answer.headers["request-id"]
    error: dict[str, Any] = body["error"]
    assert error["type"] == kind
    return error


def said(role: str, *blocks: Any) -> dict[str, Any]:
    return {"role": role, "content": list(blocks)}


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [USER, said("user", {"type": "text"})]}, "messages.1.content.0.text"),
        ({"messages": [said("user", {"text": "x"})]}, "messages.0.content.0"),
        ({"messages": [said("user", IMAGE)]}, "messages.0.content.0"),
        ({"messages": [USER, said("user", USER, {"type": "document"})]}, "messages.1.content.0"),
        (
            {"messages": [said("user", RESULT | {"content": [IMAGE]})]},
            "messages.0.content.0.content.0",
        ),
        ({"messages": [said("user", RESULT | {"is_error": 1})]}, "messages.0.content.0.is_error"),
        ({"messages": [said("user", CALL)]}, "messages.0.content.0"),
        ({"messages": [USER, said("assistant", RESULT)]}, "messages.1.content.0"),
        ({"messages": [USER, said("system", CALL)]}, "messages.1.content.0"),
        ({"messages": [USER, said("assistant", CALL)]}, "messages.1"),
        ({"system": [IMAGE]}, "system.0"),
        ({"system": 3}, "system"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"seed": "x"}, "seed"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop_sequences": ["x", ""]}, "stop_sequences.1"),
        ({"stop_sequences": [str(i) for i in range(17)]}, "stop_sequences"),
        ({"metadata": {"user_id": 3}}, "metadata.user_id"),
        ({"container": "x"}, "container"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"tools": [{"type": "telepathy_20250305", "name": "telepathy"}]}, "tools.0.type"),
        ({"tools": [{"name": "add"}]}, "tools.0.input_schema"),
        ({"tools": [TOOL | {"name": "a b"}]}, "tools.0.name"),
        ({"tools": [TOOL, TOOL]}, "tools.1.name"),
        ({"tools": [TOOL | {"allowed_callers": ["code"]}]}, "tools.0.allowed_callers"),
        ({"tool_choice": {"type": "auto"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "any", "name": "add"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "x"}}, "tool_choice.type"),
        ({"thinking": {"type": "perhaps"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"cache_control": {"type": "x"}}, "cache_control.type"),
    ],
)
def test_a_wrong_field_is_named(
    saying: Callable[..., Any], asked: dict[str, Any], param: str
) -> None:
    live = saying("2")
    error = error_of(live.post(PATHS[0], **ASKED | asked), 400, "invalid_request_error")
    assert error["param"] == param
    assert param in error["message"]
    assert live.client.requests == []


def test_a_temperature_of_openais_range_is_told_of_this_ones(shared: Any) -> None:
    error = shared.post(PATHS[0], **ASKED, temperature=1.5).json()["error"]
    assert "less than or equal to 1" in error["message"]


def test_a_kind_of_block_is_named(shared: Any) -> None:
    error = shared.post(PATHS[0], **ASKED | {"messages": [said("user", IMAGE)]}).json()["error"]
    assert "'image'" in error["message"]


def test_a_template_that_refuses_a_message_names_it(saying: Callable[..., Any]) -> None:
    live = saying("2", "strict")
    for path in PATHS:
        answer = live.post(path, **ASKED, system="Be kind.")
        error = error_of(answer, 400, "invalid_request_error")
        assert error["param"] == "system"
        assert "no system: Be kind." in error["message"]


def test_tools_without_a_template_for_them(start_server: Callable[..., Any]) -> None:
    live = start_server(model={"tools_in_prompt": "off"})
    for path in PATHS:
        answer = live.post(path, **ASKED, tools=[TOOL])
        assert error_of(answer, 400, "invalid_request_error")["param"] == "tools"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"messages": ' + b"[" * 3000,
        b'{"max_tokens": 1, "messages": [{"role": "assistant", "content": [{"type": "tool_use",'
        b'"id": "x", "name": "add", "input": ' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"}]}]}",
    ],
)
def test_a_malformed_body_is_the_clients_fault(shared: Any, path: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = shared.http.post(path, content=body, headers=headers)
    error_of(answer, 400, "invalid_request_error")


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"messages": [USER] * (MAX_MESSAGES + 1)}, "messages"),
        (
            {"messages": [said("user", *[{"type": "text", "text": ""}] * (MAX_PARTS + 1))]},
            "messages.0.content",
        ),
        ({"system": [{"type": "text", "text": ""}] * (MAX_PARTS + 1)}, "system"),
        ({"tools": [TOOL] * (MAX_TOOLS + 1)}, "tools"),
        ({"messages": [1] * 9}, "messages.0"),
        ({"messages": [said("user", *[1] * 9)]}, "messages.0.content.0"),
        ({f"unknown{i}": 1 for i in range(1025)}, None),
    ],
)
def test_too_many_of_anything_is_refused(
    live: Any, asked: dict[str, Any], param: str | None
) -> None:
    answer = live.post(PATHS[0], **ASKED | asked)
    error = error_of(answer, 400, "invalid_request_error")
    assert error["param"] == param
    assert ";" not in error["message"]


def test_numbers_of_any_size_do_no_harm(saying: Callable[..., Any]) -> None:
    schema = {"type": "object", "maximum": 10**300}
    used = CALL | {"input": {"a": 10**300}}
    asked = {"messages": [USER, said("assistant", used), said("user", RESULT)]}
    tools = [TOOL | {"input_schema": schema}]
    live = saying("2")
    for path in PATHS:
        assert live.post(path, **ASKED | asked | {"tools": tools}).status_code in {200, 400}
    function = {"name": "add", "parameters": schema}
    chat = {"messages": [USER], "tools": [{"type": "function", "function": function}]}
    assert live.post("/v1/chat/completions", **chat).status_code in {200, 400}


@pytest.mark.parametrize("path", PATHS)
def test_the_clients_own_errors(
    shared: Any, client_of: Callable[[Any], anthropic.Anthropic], path: str
) -> None:
    client = client_of(shared)
    messages = client.messages
    asked: Any = ASKED if path == PATHS[0] else {"messages": [USER]}
    ask: Any = messages.create if path == PATHS[0] else messages.count_tokens
    with pytest.raises(anthropic.NotFoundError, match="gpt-5") as caught:
        ask(model="gpt-5", **asked)
    error_of(shared.post(path, model="gpt-5", **asked), 404, "not_found_error")
    assert caught.value.type == "not_found_error"
    assert caught.value.request_id
    with pytest.raises(anthropic.BadRequestError, match="system"):
        ask(model="fake", system=3, **asked)
    with pytest.raises(anthropic.RequestTooLargeError):
        ask(model="fake", system="x" * 5000, **asked)
    answer = shared.post(path, system="x" * 5000, **asked)
    error_of(answer, 413, "request_too_large")


@pytest.mark.parametrize("path", PATHS)
def test_a_wrong_method_is_told_in_the_same_shape(shared: Any, path: str) -> None:
    answer = shared.http.get(path)
    error_of(answer, 405, "invalid_request_error")
    assert answer.headers["allow"] == "POST"


def test_without_a_key_nothing_is_answered(
    start_server: Callable[..., Any],
) -> None:
    key = "sesame"
    live = start_server(api_key=[key])
    answer = live.post(PATHS[0], **ASKED)
    error_of(answer, 401, "authentication_error")
    with anthropic.Anthropic(base_url=live.url, auth_token=key, max_retries=0) as client:
        assert client.messages.create(model="fake", **ASKED).id
    with (
        anthropic.Anthropic(base_url=live.url, api_key="wrong", max_retries=0) as client,
        pytest.raises(anthropic.AuthenticationError),
    ):
        client.messages.create(model="fake", **ASKED)


def test_a_full_queue_and_an_absent_engine(scripted: Callable[..., Any], absent: Any) -> None:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        if request.prompt_token_ids:
            raise RequestRefusedError("the queue is full", RejectKind.BUSY, None)
        yield TokenOutput()

    busy = scripted(script).post(PATHS[0], **ASKED)
    error_of(busy, 429, "rate_limit_error")
    assert busy.headers["retry-after"]
    gone = absent.post(PATHS[0], **ASKED)
    error_of(gone, 503, "overloaded_error")
    assert gone.headers["retry-after"]
    # The words of the model are there before its weights.
    assert absent.post(PATHS[1], messages=[USER]).status_code == 200


def test_a_bug_shows_nothing_of_the_insides(scripted: Callable[..., Any]) -> None:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        if request.prompt_token_ids:
            raise KeyError("the secret of the insides")
        yield TokenOutput()

    answer = scripted(script).post(PATHS[0], **ASKED)
    assert answer.headers["request-id"] in error_of(answer, 500, "api_error")["message"]
    assert "secret" not in json.dumps(answer.json())
