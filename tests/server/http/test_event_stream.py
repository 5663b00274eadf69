"""Streams without an event for a while."""

from __future__ import annotations

import asyncio
import json
import selectors
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any

import httpx
import openai
import pytest

from scheduler.client import (
    FinishReason,
    GenerateRequest,
    RejectKind,
    RequestRefusedError,
    Started,
    TokenOutput,
)
from server.http import sse
from server.http.event_stream import EventStream
from waiting import TIMEOUT_S

SHORT_S = 0.005


class _JumpingSelector(selectors.SelectSelector):
    """Where a loop would sleep, its clock jumps."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        self.now_s += timeout or 0.0
        return super().select(0)


class _JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _JumpingSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s


def run(test: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=_JumpingLoop) as runner:
        runner.run(test)


class Wire:
    """The messages sent, with their times; a reader that does not read blocks it."""

    def __init__(self) -> None:
        self.sent: list[tuple[float, Any]] = []
        self.is_read = asyncio.Event()
        self.is_read.set()

    async def send(self, message: Any) -> None:
        await self.is_read.wait()
        now_s = round(asyncio.get_running_loop().time(), 3)
        self.sent.append((now_s, message.get("body", message.get("status"))))


def test_silence_is_filled_and_only_silence() -> None:
    async def test() -> None:
        wire = Wire()
        async with EventStream(wire.send, 10.0) as stream:
            await asyncio.sleep(25.0)
            await stream.write(b"a")
            await asyncio.sleep(9.0)
            await stream.write(b"b")
            await asyncio.sleep(11.0)
            await stream.write(b"c", is_last=True)
            await asyncio.sleep(100.0)
        assert wire.sent == [
            (10.0, 200),
            (10.0, sse.KEEP_ALIVE),
            (20.0, sse.KEEP_ALIVE),
            (25.0, b"a"),
            (34.0, b"b"),
            (44.0, sse.KEEP_ALIVE),
            (45.0, b"c"),
        ]

    run(test())


def test_a_stream_that_is_never_silent_begins_with_its_first_event() -> None:
    async def test() -> None:
        wire = Wire()
        async with EventStream(wire.send, 10.0) as stream:
            for _ in range(3):
                await asyncio.sleep(9.0)
                await stream.write(b"x")
        assert [body for _, body in wire.sent] == [200, b"x", b"x", b"x"]

    run(test())


def test_what_is_not_read_is_not_added_to() -> None:
    async def test() -> None:
        wire = Wire()
        async with EventStream(wire.send, 10.0) as stream:
            await stream.write(b"a")
            wire.is_read.clear()
            writing = asyncio.create_task(stream.write(b"b"))
            await asyncio.sleep(1000.0)
            wire.is_read.set()
            await writing
            await asyncio.sleep(1.0)
        assert [body for _, body in wire.sent] == [200, b"a", b"b"]

    run(test())


def test_a_keep_alive_that_is_not_read_holds_events_back_and_is_one() -> None:
    async def test() -> None:
        wire = Wire()
        async with EventStream(wire.send, 10.0) as stream:
            await stream.write(b"a")
            wire.is_read.clear()
            await asyncio.sleep(500.0)
            writing = asyncio.create_task(stream.write(b"b"))
            await asyncio.sleep(500.0)
            wire.is_read.set()
            await writing
        assert [body for _, body in wire.sent] == [200, b"a", sse.KEEP_ALIVE, b"b"]

    run(test())


def test_0_is_off_and_an_end_leaves_no_task() -> None:
    async def test() -> None:
        wire = Wire()
        async with EventStream(wire.send, 0.0):
            assert len(asyncio.all_tasks()) == 1
            await asyncio.sleep(10_000.0)
        assert wire.sent == []
        with pytest.raises(KeyError):
            async with EventStream(wire.send, 1.0):
                raise KeyError
        assert len(asyncio.all_tasks()) == 1

    run(test())


def test_a_request_in_the_queue_is_kept_alive_and_its_refusal_is_an_event(
    scripted: Callable[..., Any],
) -> None:
    is_heard = threading.Event()

    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        if request.prompt_token_ids:
            await asyncio.to_thread(is_heard.wait, TIMEOUT_S)
            raise RequestRefusedError("the queue is full", RejectKind.BUSY, None)
        yield TokenOutput()

    live = scripted(script, sse_keep_alive_s=SHORT_S)
    data = json.dumps({"prompt": "x", "stream": True}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    received = b""
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.sendall(head.encode() + data)
        while received.count(sse.KEEP_ALIVE) < 3:
            received += connection.recv(65536)
        is_heard.set()
        received += b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 200")
    assert b'"code":"queue_full"' in received
    assert received.rstrip(b"\r\n0").endswith(sse.DONE.rstrip())
    assert live.log_lines()[-1]["status"] == 429
    assert live.metric('octavo_requests_rejected_total{reason="queue_full"}') == 1


class _Listening(httpx.HTTPTransport):
    """Reports when so many keep-alives have come by."""

    def __init__(self) -> None:
        super().__init__()
        self.num_keep_alives = 0
        self.has_heard = threading.Event()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = super().handle_request(request)
        heard = _Ears(self, answer)
        return httpx.Response(answer.status_code, headers=answer.headers, stream=heard)


class _Ears(httpx.SyncByteStream):
    def __init__(self, listening: _Listening, answer: httpx.Response) -> None:
        self._listening = listening
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        assert isinstance(self._answer.stream, httpx.SyncByteStream)
        for chunk in self._answer.stream:
            self._listening.num_keep_alives += chunk.count(sse.KEEP_ALIVE)
            if self._listening.num_keep_alives >= 5:
                self._listening.has_heard.set()
            yield chunk

    def close(self) -> None:
        self._answer.close()


@pytest.mark.parametrize("num_before", [0, 2], ids=["at the start", "between tokens"])
def test_openais_client_passes_them_over(scripted: Callable[..., Any], num_before: int) -> None:
    listening = _Listening()

    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        del request
        started: Started | None = Started(1, 0.0, 0)
        for index in range(4):
            if index == num_before:
                await asyncio.to_thread(listening.has_heard.wait, TIMEOUT_S)
            yield TokenOutput((65 + index,), started=started)
            started = None
        yield TokenOutput(finish_reason=FinishReason.LENGTH)

    live = scripted(script, sse_keep_alive_s=SHORT_S)
    # The newest client has a fork of httpx of its own, and takes this one as well.
    http: Any = httpx.Client(transport=listening)
    with openai.OpenAI(
        base_url=live.url + "/v1", api_key="x", max_retries=0, http_client=http
    ) as api:
        chunks = list(
            api.chat.completions.create(
                model="fake", messages=[{"role": "user", "content": "x"}], stream=True
            )
        )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "ABCD"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert listening.num_keep_alives >= 5
