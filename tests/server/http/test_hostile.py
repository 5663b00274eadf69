"""Requests made to cost much: each is refused early, and no other request waits for it."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Annotated, Any

import pytest
from pydantic import BeforeValidator

from server.generation import prompt_messages, request_fields, respond
from server.http.context import BodyBudget
from server.http.errors import ApiError
from server.http.work import LONG_CHARS, Workshop
from server.openai import schemas
from server.responses.schemas import ResponsesRequest
from server.text.template import ChatTemplate
from server.text.tokenizer import Tokenizer
from waiting import TIMEOUT_S

USER = {"role": "user", "content": "x"}
CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"


@pytest.fixture(scope="module")
def roomy(start_shared: Callable[..., Any]) -> Any:
    """A server that takes bodies of the usual size."""
    return start_shared()


@pytest.mark.parametrize(
    ("path", "model", "needed"),
    [
        (CHAT, schemas.ChatRequest, {"messages": [USER]}),
        (COMPLETION, schemas.CompletionRequest, {"prompt": "x"}),
        ("/v1/responses", ResponsesRequest, {"input": "x"}),
        ("/tokenize", schemas.TokenizeRequest, {"prompt": "x"}),
        ("/detokenize", schemas.DetokenizeRequest, {"tokens": [1]}),
    ],
)
def test_null_is_the_default_of_every_field(
    shared: Any, path: str, model: type[request_fields.Request], needed: dict[str, Any]
) -> None:
    asked = dict.fromkeys(model.model_fields) | needed
    answer = shared.post(path, **asked)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "asked", "param"),
    [
        (CHAT, {"messages": [1] * 9}, "messages.0"),
        (CHAT, {"messages": [{"role": "user", "content": [1] * 9}]}, "messages.0.content.0"),
        (COMPLETION, {"prompt": "x", "stop": [1] * 9}, "stop.0"),
        (COMPLETION, {"prompt": "x", "stop_token_ids": ["1"] * 9}, "stop_token_ids.0"),
        ("/detokenize", {"tokens": ["1"] * 9}, "tokens.0"),
        ("/v1/responses", {"input": [1] * 9}, "input.0"),
        ("/v1/responses", {"input": [{"role": "user", "content": [1] * 9}]}, "input.0.content.0"),
    ],
)
def test_a_list_ends_at_its_first_fault(
    shared: Any, path: str, asked: dict[str, Any], param: str
) -> None:
    error = shared.post(path, **asked).json()["error"]
    assert error["param"] == param
    assert ";" not in error["message"]


_TOKENS = request_fields.MAX_LISTED_TOKENS + 1


@pytest.mark.parametrize(
    ("path", "asked", "param"),
    [
        (CHAT, {"messages": [USER] * (prompt_messages.MAX_MESSAGES + 1)}, "messages"),
        ("/tokenize", {"messages": [USER] * (prompt_messages.MAX_MESSAGES + 1)}, "messages"),
        (
            CHAT,
            {"messages": [USER | {"content": [{"type": "text", "text": ""}] * 4097}]},
            "messages.0.content",
        ),
        (COMPLETION, {"prompt": "x", "stop_token_ids": [1] * _TOKENS}, "stop_token_ids"),
        (
            COMPLETION,
            {"prompt": "x", "logit_bias": {str(i): "wrong too" for i in range(_TOKENS)}},
            "logit_bias",
        ),
        (
            CHAT,
            {"messages": [USER], "chat_template_kwargs": {f"v{i}": 1 for i in range(65)}},
            "chat_template_kwargs",
        ),
        (COMPLETION, {"prompt": "x", **{f"unknown{i}": 1 for i in range(1025)}}, None),
    ],
)
def test_too_many_of_anything_is_refused(
    roomy: Any, path: str, asked: dict[str, Any], param: str | None
) -> None:
    answer = roomy.post(path, **asked)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_the_length_of_a_prompt_is_judged_before_its_tokens(roomy: Any) -> None:
    error = roomy.post(COMPLETION, prompt=[99_999] * 300).json()["error"]
    assert error["code"] == "context_length_exceeded"


def test_a_long_body_is_parsed_beside_the_event_loop() -> None:
    threads = []

    def noted(value: object) -> object:
        threads.append(threading.get_ident())
        return value

    class Noting(request_fields.Request):
        text: Annotated[str, BeforeValidator(noted)]

    for num_chars in (1, 100_000):
        body = json.dumps({"text": "x" * num_chars}).encode()
        asyncio.run(request_fields.parse(Noting, body, Workshop()))
    assert threads[0] == threading.get_ident() != threads[1]


@pytest.mark.parametrize(
    ("converter", "name", "path", "asked"),
    [
        (Tokenizer, "decode", "/detokenize", {"tokens": [1] * LONG_CHARS}),
        (ChatTemplate, "render", "/tokenize", {"messages": [USER | {"content": ""}] * 200}),
    ],
)
def test_long_conversions_run_beside_the_event_loop(
    roomy: Any,
    monkeypatch: pytest.MonkeyPatch,
    converter: type[object],
    name: str,
    path: str,
    asked: dict[str, Any],
) -> None:
    convert = getattr(converter, name)
    threads = []

    def noted(*args: object, **kwargs: object) -> object:
        threads.append(threading.get_ident())
        return convert(*args, **kwargs)

    async def loop_thread() -> int:
        return threading.get_ident()

    monkeypatch.setattr(converter, name, noted)
    assert roomy.post(path, **asked).status_code == 200
    assert threads
    assert roomy.call(loop_thread()) not in threads


@pytest.mark.parametrize(
    "head",
    [b"Content-Length: 99999999\r\n", b"Content-Length: 4097\r\nExpect: 100-continue\r\n"],
    ids=["far-too-large", "asks-first"],
)
def test_a_body_that_is_announced_too_large_is_refused_unread(shared: Any, head: bytes) -> None:
    with socket.create_connection(("127.0.0.1", shared.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n")
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_a_body_that_stops_coming_is_given_up(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(respond, "BODY_TIMEOUT_S", 0.05)
    with socket.create_connection(("127.0.0.1", shared.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


def test_bodies_that_are_never_finished_take_so_much_and_no_more(live_small: Any) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 4096\r\n\r\n"
    with ExitStack() as stack:
        held: list[socket.socket] = []
        refused: list[socket.socket] = []
        while not refused:
            assert len(held) < 512, "all of them are held"
            one = socket.create_connection(("127.0.0.1", live_small.port), timeout=TIMEOUT_S)
            held.append(stack.enter_context(one))
            one.sendall(head + b"x" * 4000)
            refused = select.select(held, [], [], 0.05)[0]
        answer = b"".join(iter(lambda: refused[0].recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 503")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "unavailable"
    live_small.wait_idle()
    assert live_small.post("/tokenize", prompt="x" * 4000).status_code == 200


def test_half_of_the_room_for_bodies_is_for_others() -> None:
    budget = BodyBudget(100)
    with budget.reading("one") as take, budget.reading("other") as take_other:
        take(50)
        take_other(50)
        with pytest.raises(ApiError), budget.reading("one") as take_more:
            take_more(1)
        with pytest.raises(ApiError), budget.reading("third") as take_more:
            take_more(1)
    with budget.reading("one") as take:
        take(50)
    assert not budget._held


@pytest.fixture
def live_small(start_server: Callable[..., Any]) -> Any:
    return start_server(max_request_bytes=4096)


def test_a_client_that_wants_a_web_socket_fills_no_log(live: Any) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
    assert live.http.get("/version", headers=upgrade).status_code == 200
    assert [line["event"] for line in live.log_lines()] == ["request"]
