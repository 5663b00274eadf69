"""Requests that take too long: the client hears of it, and the engine gets its pages back."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Callable
from typing import Any

import openai
import pytest

from event_streams import chunks_of
from model.fake import FakeRunner
from scheduler.client import GenerateRequest, Started, TokenOutput
from waiting import TIMEOUT_S

PATHS = ("/v1/chat/completions", "/v1/completions")
BODY: dict[str, Any] = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}
#: Longer than the timeout of any test, and no step of it is long.
LONG: dict[str, Any] = {"max_tokens": 900_000, "ignore_eos": True}


async def endless(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
    """Yield one token, then nothing for ever."""
    del request
    yield TokenOutput((72,), started=Started(1, 0.0, 0))
    await asyncio.Event().wait()


async def never(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
    """Yield nothing at all, as in a queue that does not move."""
    async for delta in endless(_, request):
        if delta.finish_reason is not None:
            yield delta


@pytest.fixture
def busy(start_server: Callable[..., Any]) -> Callable[..., Any]:
    """The real engine, with room for one sequence, which may be as long as an afternoon."""

    def start(**section: Any) -> Any:
        runner = FakeRunner(
            vocab_size=300, max_model_len=1_000_000, num_pages=250_000, is_strict=False
        )
        return start_server(runner=runner, scheduler={"max_num_seqs": 1}, **section)

    return start


def idle_pages(live: Any) -> tuple[int, int, int]:
    """Return the resources in use once nothing should run: all zero."""
    live.wait_idle()
    assert live.post("/v1/completions", prompt="z", max_tokens=1).status_code == 200
    live.client.check()
    stats = live.client.stats()
    return stats.scheduler.num_running, stats.num_waiting, stats.cache.pages_private


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("script", [endless, never], ids=["begun", "queued"])
def test_a_whole_answer_that_comes_too_late_is_408(
    scripted: Callable[..., Any], path: str, script: Any
) -> None:
    live = scripted(script)
    answer = live.post(path, **BODY, timeout=0.05)
    assert answer.status_code == 408
    assert answer.headers["x-should-retry"] == "false"
    assert list(answer.json()) == ["error"], "no half answer"
    error = answer.json()["error"]
    assert error["type"] == "timeout_error"
    assert error["param"] == "timeout"
    assert error["code"] == "deadline_exceeded"
    assert "0.05 seconds" in error["message"]
    assert live.client.was_closed.wait(TIMEOUT_S)
    assert live.metric('octavo_request_success_total{finished_reason="abort"}') == 1
    assert live.metric('octavo_http_responses_total{status="408"}') == 1
    line = live.log_lines()[-1]
    assert (line["status"], line["error"]) == (408, "deadline_exceeded")
    assert line["finish_reason"] == "abort"


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_that_takes_too_long_ends_with_an_error_event(
    scripted: Callable[..., Any], path: str
) -> None:
    live = scripted(endless)
    answer = live.post(path, **BODY, stream=True, timeout=1)
    assert answer.status_code == 200
    *told, end = chunks_of(answer.content)
    assert end["error"]["code"] == "deadline_exceeded"
    assert "H" in str(told), "what was said before stays said"
    assert live.log_lines()[-1]["status"] == 408


@pytest.mark.parametrize("asked", [{}, {"timeout": 80_000}], ids=["none", "more"])
def test_the_servers_own_limit_holds_for_all(
    scripted: Callable[..., Any], asked: dict[str, Any]
) -> None:
    live = scripted(endless, request_timeout_s=0.05)
    answer = live.chat(**asked)
    assert answer.status_code == 408
    error = answer.json()["error"]
    assert error["param"] is None
    assert "this server allows" in error["message"]


def test_what_a_request_may_ask_for_is_not_more_than_the_server_gives(
    scripted: Callable[..., Any],
) -> None:
    live = scripted(endless, request_timeout_s=3600)
    assert live.chat(timeout=0.05).json()["error"]["param"] == "timeout"


def test_one_that_runs_gives_its_pages_back(busy: Callable[..., Any]) -> None:
    live = busy()
    assert live.post("/v1/completions", prompt="x", timeout=0.1, **LONG).status_code == 408
    assert idle_pages(live) == (0, 0, 0)


def test_one_that_waits_leaves_the_queue_and_the_one_that_runs(busy: Callable[..., Any]) -> None:
    live = busy()
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        data = json.dumps({"prompt": "x", **LONG}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        while live.metric("octavo_num_requests_running") == 0:
            pass
        answer = live.post("/v1/completions", prompt="y", n=3, timeout=0.05)
        assert answer.status_code == 408
        assert live.metric("octavo_num_requests_running") == 1
        while live.metric("octavo_num_requests_waiting"):
            pass
    assert idle_pages(live) == (0, 0, 0)


def test_one_that_is_quick_enough_never_hears_of_it(live: Any) -> None:
    answer = live.chat(max_tokens=3, timeout=2 * TIMEOUT_S)
    assert answer.status_code == 200
    assert answer.json()["octavo"]["warnings"] == []
    assert live.client.stats().scheduler.num_running == 0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [0, -1, "5", 86_401, True])
def test_a_timeout_that_is_none_is_refused_by_name(shared: Any, path: str, value: Any) -> None:
    answer = shared.post(path, **BODY, timeout=value)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "timeout"


def test_openais_client_does_not_send_it_again(scripted: Callable[..., Any]) -> None:
    live = scripted(endless)
    with (
        openai.OpenAI(base_url=live.url + "/v1", api_key="x", max_retries=2) as api,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        api.completions.create(model="fake", prompt="x", extra_body={"timeout": 0.05})
    assert caught.value.status_code == 408
    assert len(live.client.requests) == 1


def test_the_time_begins_with_the_request_not_with_its_turn(scripted: Callable[..., Any]) -> None:
    """Deltas that keep coming do not keep a request alive."""

    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        del request
        yield TokenOutput((72,), started=Started(1, 0.0, 0))
        while True:
            await asyncio.sleep(0)
            yield TokenOutput((72,))

    assert scripted(script).chat(timeout=0.05, max_tokens=10).status_code == 408
