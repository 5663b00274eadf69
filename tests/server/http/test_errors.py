from __future__ import annotations

import json
import socket
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from scheduler.client import GenerateRequest, RejectKind, RequestRefusedError, TokenOutput
from server.text.load import ModelText

USER = {"role": "user", "content": "x"}
CHAT = "/v1/chat/completions"


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [3]}, "messages.0"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [USER, {"role": "robot", "content": "x"}]}, "messages.1.role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.type",
        ),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 500}, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"priority": 2**40}, "priority"),
        ({"stop": ""}, "stop.0"),
        ({"stop": ["x", 1]}, "stop.1"),
        ({"stop": ["x" * 1025]}, "stop.0"),
        ({"stop": [str(i) for i in range(17)]}, "stop"),
        ({"stop_token_ids": [300]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 1000: 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": "x"}}, "logit_bias.1"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": 3}, "stream_options"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": 1}},
            "stream_options.continuous_usage_stats",
        ),
        ({"cache_salt": ""}, "cache_salt"),
        ({"n": 17}, "n"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ({"guided_json": []}, "guided_json"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": 1}, "chat_template_kwargs"),
    ],
)
def test_a_wrong_field_is_named(shared: Any, asked: dict[str, Any], param: str) -> None:
    messages = {} if not asked else {"messages": [USER]}
    error = error_of(shared.post(CHAT, **(messages | asked)), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.partition(".")[0] in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": ' + b"[" * 3000,
        b'{"prompt": "x", "x": ' + b"[" * 500 + b"]" * 500 + b', "messages": [] }',
        b"--x\r\nContent-Disposition: form-data\r\n",
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/tokenize", "/detokenize"])
def test_a_malformed_body_is_the_clients_fault(shared: Any, body: bytes, path: str) -> None:
    headers = {"Content-Type": "application/json"}
    error_of(shared.http.post(path, content=body, headers=headers), 400)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("temperature", "NaN"),
        ("temperature", "1e999"),
        ("top_p", "-Infinity"),
        ("seed", "1" + "0" * 3000),
    ],
)
def test_a_number_that_is_none_is_named(shared: Any, name: str, number: str) -> None:
    body = f'{{"messages": [{{"role": "user", "content": "x"}}], "{name}": {number}}}'
    headers = {"Content-Type": "application/json"}
    error = error_of(shared.http.post(CHAT, content=body, headers=headers), 400)
    assert error["param"] == name


def test_template_variables_of_any_depth_and_size_do_no_harm(shared: Any) -> None:
    nested: object = 1
    for _ in range(150):
        nested = {"a": [nested]} if _ % 2 else [nested]
    answer = shared.chat(max_tokens=1, chat_template_kwargs={"deep": nested, "big": 10**300})
    assert answer.status_code in {200, 400}


def test_another_content_type_is_refused(shared: Any) -> None:
    answer = shared.http.post(CHAT, data={"messages": "x"})
    assert "application/json" in error_of(answer, 400)["message"]
    with_charset = {"Content-Type": "Application/JSON; charset=utf-8"}
    body = json.dumps({"messages": [USER], "max_tokens": 1})
    assert shared.http.post(CHAT, content=body, headers=with_charset).status_code == 200


@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
def test_a_body_that_is_too_large_is_refused(shared: Any, is_chunked: bool) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(5):
            yield b" " * 1000

    content = chunks() if is_chunked else b" " * 4097
    headers = {"Content-Type": "application/json"}
    error = error_of(shared.http.post(CHAT, content=content, headers=headers), 413)
    assert error["code"] == "request_too_large"
    assert "4096" in error["message"]
    body = json.dumps({"messages": [USER], "max_tokens": 1}).ljust(4096)
    assert shared.http.post(CHAT, content=body, headers=headers).status_code == 200


def test_an_endless_body_is_cut_off(shared: Any) -> None:
    with socket.create_connection(("127.0.0.1", shared.port)) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
        for _ in range(17):
            connection.sendall(chunk)
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_a_client_that_leaves_before_its_body_is_no_error(start_server: Callable[..., Any]) -> None:
    live = start_server()
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n"
        connection.sendall(head.encode() + b"{")
        while live.lifecycle.num_in_flight == 0:
            pass
    live.wait_idle()
    assert live.log_lines()[-1]["status"] == 499


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/nothing", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("POST", "//v1/chat/completions", 404),
        ("GET", "/redoc", 404),
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/v1/models", 405),
        ("OPTIONS", "/health", 405),
        ("GET", "/v1/models/other/model", 404),
    ],
)
def test_unknown_routes_and_methods(shared: Any, method: str, path: str, status: int) -> None:
    answer = shared.http.request(method, shared.url + path)
    error = error_of(answer, status)
    assert error["code"]
    if status == 405:
        assert answer.headers["allow"]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/tokenize", "/detokenize"])
def test_an_unknown_model_is_not_found(shared: Any, path: str) -> None:
    bodies: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [USER]},
        "/v1/completions": {"prompt": "x"},
        "/tokenize": {"prompt": "x"},
        "/detokenize": {"tokens": [1]},
    }
    error = error_of(shared.post(path, model="gpt-5", **bodies[path]), 404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [(RejectKind.INVALID, 400, None), (RejectKind.BUSY, 429, "queue_full")],
)
@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_what_the_engine_refuses(
    scripted: Callable[..., Any], kind: RejectKind, status: int, code: str | None, is_stream: bool
) -> None:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        if request.prompt_token_ids:
            raise RequestRefusedError("the engine says no", kind, "max_tokens")
        yield TokenOutput()

    live = scripted(script)
    answer = live.chat(stream=is_stream)
    error = error_of(answer, status)
    assert error == error | {"message": "the engine says no", "param": "max_tokens", "code": code}
    assert ("retry-after" in answer.headers) == (status == 429)
    stats = live.http.get("/metrics").text
    assert 'request_success_total{finished_reason="error",model_name="fake"} 0.0' in stats


def test_a_full_queue_of_the_real_engine_is_429(start_server: Callable[..., Any]) -> None:
    live = start_server(scheduler={"max_queue": 0, "max_num_seqs": 1})
    with openai.OpenAI(base_url=live.url + "/v1", api_key="x", max_retries=0) as api:
        with pytest.raises(openai.RateLimitError) as caught:
            api.completions.create(model="fake", prompt="x", n=2, stream=True)
        assert caught.value.code == "queue_full"
        assert caught.value.response.headers["retry-after"] == "2"
    # The choice that had room ended with the one that had none.
    live.wait_idle()
    assert live.post("/v1/completions", prompt="y", max_tokens=1).status_code == 200
    stats = live.client.stats()
    assert (stats.scheduler.num_running, stats.num_waiting) == (0, 0)
    assert stats.cache.pages_private == 0
    assert live.metric('octavo_requests_rejected_total{reason="queue_full"}') == 1
    live.client.check()


def test_an_engine_that_is_not_there_is_503(absent: Any) -> None:
    for answer in (absent.chat(), absent.http.get("/ready"), absent.http.get("/v1/models")):
        error = error_of(answer, 503)
        assert int(answer.headers["retry-after"]) > 0
        assert error["type"] == "service_unavailable_error"
    assert absent.http.get("/health").status_code == 200
    assert "octavo_num_requests_running" in absent.http.get("/metrics").text


def test_a_model_without_a_template_cannot_chat(
    start_server: Callable[..., Any], text: ModelText
) -> None:
    live = start_server(words=ModelText(text.tokenizer, None))
    assert error_of(live.chat(), 400)["param"] == "messages"
    assert live.post("/v1/completions", prompt="x").status_code == 200


def test_a_bug_shows_nothing_of_the_insides(scripted: Callable[..., Any]) -> None:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        if request.prompt_token_ids:
            raise KeyError("the secret of the insides")
        yield TokenOutput()

    live = scripted(script)
    answer = live.chat(content="a private question")
    error = error_of(answer, 500)
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in error["message"]
    lines = live.log_lines()
    assert "the secret of the insides" in lines[0]["traceback"]
    assert lines[0]["id"] == lines[1]["id"] == answer.headers["x-request-id"]
    assert "a private question" not in live.log.getvalue()
