"""The effect on the engine of a client that comes, reads slowly, or leaves."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from event_streams import chunks_of
from scheduler.client import (
    EngineFaultError,
    EngineUnavailableError,
    FinishReason,
    GenerateRequest,
    Started,
    TokenOutput,
)
from waiting import TIMEOUT_S

STARTED = Started(1, 0.0, 0)


async def endless(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
    """Yield one token, then nothing for ever."""
    del request
    yield TokenOutput((72,), started=STARTED)
    await asyncio.Event().wait()


def request_bytes(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def test_a_streams_headers_keep_proxies_from_buffering(live: Any) -> None:
    answer = live.chat(max_tokens=1, stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"


def test_a_stream_ends_with_done_and_tells_octavos_own_once(live: Any) -> None:
    chunks = chunks_of(live.chat(max_tokens=3, stream=True, nonsense=1).content)
    assert all("usage" not in chunk for chunk in chunks)
    assert ["octavo" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["octavo"]["warnings"][0]["param"] == "nonsense"


@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_an_answer_that_was_given_is_200_in_the_log(
    live: Any, num_choices: int, is_stream: bool
) -> None:
    """Regression: the server calls the end of an answer a disconnect, as if the client had left."""
    assert live.chat(max_tokens=3, n=num_choices, stream=is_stream).status_code == 200
    [line] = live.log_lines()
    assert (line["status"], line["finish_reason"]) == (200, "length")
    assert live.metric('octavo_http_responses_total{status="499"}') == 0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_cancels_its_request(
    scripted: Callable[..., Any], path: str, is_stream: bool
) -> None:
    live = scripted(endless)
    body = {"messages": [{"role": "user", "content": "x"}], "prompt": "x", "stream": is_stream}
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.sendall(request_bytes(path, body))
        assert live.client.was_asked.wait(TIMEOUT_S)
        if is_stream:
            assert connection.recv(1) == b"H", "the answer begins with HTTP"
    assert live.client.was_closed.wait(TIMEOUT_S)
    live.wait_idle()
    assert live.metric('octavo_request_success_total{finished_reason="abort"}') == 1
    line = live.log_lines()[-1]
    assert line["finish_reason"] == "abort"
    assert line["status"] == 499


def test_a_client_that_leaves_gives_the_real_engines_pages_back(live: Any) -> None:
    body = {"prompt": "x", "stream": True, "max_tokens": 250, "ignore_eos": True}
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.sendall(request_bytes("/v1/completions", body))
        assert connection.recv(1) == b"H"
    live.wait_idle()
    live.post("/v1/completions", prompt="y", max_tokens=1)
    stats = live.client.stats()
    assert stats.scheduler.num_running == 0
    assert (stats.cache.pages_private, stats.cache.pages_leased) == (0, 0)
    live.client.check()


class Flood:
    """A script that gives text as fast as it is taken, until it is not taken any more."""

    def __init__(self) -> None:
        self.num_deltas = 0
        self.is_stuck = threading.Event()

    async def __call__(
        self, _: object, request: GenerateRequest
    ) -> AsyncGenerator[TokenOutput, None]:
        del request
        watch = asyncio.create_task(self._tell_when_stuck())
        try:
            yield TokenOutput((72,), started=STARTED)
            while not self.is_stuck.is_set():
                self.num_deltas += 1
                yield TokenOutput((72,) * 4096)
            yield TokenOutput(finish_reason=FinishReason.LENGTH)
        finally:
            watch.cancel()

    async def _tell_when_stuck(self) -> None:
        """Set an event when the loop runs dry again and again, and no more items are taken."""
        last, num_same = -1, 0
        while num_same < 2000:
            num_same = num_same + 1 if self.num_deltas == last else 0
            last = self.num_deltas
            await asyncio.sleep(0)
        self.is_stuck.set()


def test_a_slow_reader_stops_the_engines_generator(scripted: Callable[..., Any]) -> None:
    """The engine's client goes on collecting; that becomes one delta, and one event."""
    flood = Flood()
    live = scripted(flood)
    body = {"prompt": "x", "stream": True, "max_tokens": 200}
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.sendall(request_bytes("/v1/completions", body))
        assert flood.is_stuck.wait(TIMEOUT_S), "memory grows with what is not read"
        received = bytearray()
        while b"[DONE]" not in received:
            received += connection.recv(1 << 20)
    live.wait_idle()
    assert received.count(b"H") >= 4096 * flood.num_deltas


def test_a_reader_that_stopped_does_not_hold_up_a_drain(scripted: Callable[..., Any]) -> None:
    flood = Flood()
    live = scripted(flood)
    body = {"prompt": "x", "stream": True, "max_tokens": 200}
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.sendall(request_bytes("/v1/completions", body))
        assert flood.is_stuck.wait(TIMEOUT_S)
        assert not live.call(live.lifecycle.drain(0))
        assert live.client.was_closed.is_set()


def test_deltas_of_many_tokens_are_one_write(scripted: Callable[..., Any]) -> None:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        del request
        yield TokenOutput((72, 101, 108), started=STARTED)
        yield TokenOutput((108, 111), finish_reason=FinishReason.LENGTH)

    chunks = chunks_of(scripted(script).chat(stream=True).content)
    texts = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    assert texts == ["", "Hel", "lo", None]


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [
        (EngineFaultError("step failed"), 500, "server_error"),
        (EngineUnavailableError("the engine died"), 503, "service_unavailable_error"),
        (KeyError("a bug"), 500, "server_error"),
    ],
)
@pytest.mark.parametrize("is_begun", [False, True], ids=["before", "after"])
def test_a_failure_reaches_the_client_of_a_stream(
    scripted: Callable[..., Any], fault: Exception, status: int, kind: str, is_begun: bool
) -> None:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        del request
        if is_begun:
            yield TokenOutput((72,), started=STARTED)
        raise fault

    live = scripted(script)
    answer = live.chat(stream=True)
    if is_begun:
        assert answer.status_code == 200
        error = chunks_of(answer.content)[-1]["error"]
    else:
        assert answer.status_code == status
        error = answer.json()["error"]
    assert error["type"] == kind
    assert "a bug" not in error["message"]
    assert "Traceback" not in answer.text
    assert live.log_lines()[-1]["status"] == status
    assert live.metric('octavo_request_success_total{finished_reason="error"}') == 1
    assert live.http.get("/ready").status_code == 200, "others live"


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR, None])
def test_a_request_the_engine_gave_up_is_no_success(
    scripted: Callable[..., Any], reason: FinishReason | None
) -> None:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        del request
        yield TokenOutput((72,), started=STARTED, finish_reason=reason)

    answer = scripted(script).chat()
    assert answer.status_code in {500, 503}
    assert answer.json()["error"]["message"]


def test_many_streams_at_once_get_their_own_text(live: Any) -> None:
    alone = {
        word: live.post("/v1/completions", prompt=word, max_tokens=30).json()["choices"][0]["text"]
        for word in map(str, range(12))
    }
    together: dict[str, str] = {}

    def ask(word: str) -> None:
        answer = live.post("/v1/completions", prompt=word, max_tokens=30, stream=True)
        chunks = chunks_of(answer.content)
        together[word] = "".join(chunk["choices"][0]["text"] for chunk in chunks)

    threads = [threading.Thread(target=ask, args=(word,)) for word in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert together == alone


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": False}}])
@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_every_stream_tells_the_usage_if_the_operator_wants_it(
    start_server: Callable[..., Any], path: str, asked: dict[str, Any], options: dict[str, Any]
) -> None:
    def last(**section: Any) -> dict[str, Any]:
        live = start_server(**section)
        return chunks_of(live.post(path, **asked, **options, max_tokens=3, stream=True).content)[-1]

    assert "usage" not in last()
    chunk = last(force_include_usage=True)
    assert (chunk["choices"], chunk["usage"]["completion_tokens"]) == ([], 3)
