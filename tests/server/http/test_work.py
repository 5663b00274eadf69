"""Long conversions: beside the loop, few at a time, and over when no request waits."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from server.http.work import (
    HUGE_CHARS,
    LONG_CHARS,
    NUM_HUGE,
    NUM_LONG,
    AbandonedError,
    Check,
    Workshop,
)
from server.text import tokenizer
from waiting import TIMEOUT_S


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, TIMEOUT_S))


class Held:
    """A conversion that goes on until a test ends it, or until no request waits for it."""

    def __init__(self) -> None:
        self.has_begun, self.may_end, self.was_abandoned = (threading.Event() for _ in range(3))

    def __call__(self, check: Check) -> str:
        self.has_begun.set()
        while not self.may_end.wait(0.001):
            try:
                check()
            except AbandonedError:
                self.was_abandoned.set()
                raise
        return "done"

    async def begun(self) -> None:
        assert await asyncio.to_thread(self.has_begun.wait, TIMEOUT_S)


def test_short_texts_are_converted_at_once() -> None:
    async def scene() -> None:
        here = threading.get_ident()
        assert await Workshop().run(lambda _: threading.get_ident(), LONG_CHARS - 1) == here
        assert await Workshop().run(lambda _: threading.get_ident(), LONG_CHARS) != here

    run(scene())


def test_an_error_reaches_the_caller_and_leaves_the_place_free() -> None:
    async def scene() -> None:
        work = Workshop()
        for _ in range(3 * NUM_HUGE):
            with pytest.raises(ZeroDivisionError):
                await work.run(lambda _: 1 // 0, HUGE_CHARS)

    run(scene())


@pytest.mark.parametrize(("length", "count"), [(LONG_CHARS, NUM_LONG), (HUGE_CHARS, NUM_HUGE)])
def test_as_many_as_there_are_places_run_side_by_side(length: int, count: int) -> None:
    async def scene() -> None:
        work, held = Workshop(), [Held() for _ in range(count + 2)]
        tasks = [asyncio.create_task(work.run(one, length)) for one in held]
        for one in held[:count]:
            await one.begun()
        assert not any(one.has_begun.is_set() for one in held[count:])
        held[0].may_end.set()
        await held[count].begun()  # the one that came first
        assert not held[count + 1].has_begun.is_set()
        for one in held:
            one.may_end.set()
        assert await asyncio.gather(*tasks) == ["done"] * len(held)

    run(scene())


def test_huge_texts_do_not_hold_up_long_ones() -> None:
    async def scene() -> None:
        work, held = Workshop(), [Held() for _ in range(NUM_HUGE + 3)]
        tasks = [asyncio.create_task(work.run(one, HUGE_CHARS)) for one in held]
        await held[0].begun()
        assert await work.run(lambda _: 1, LONG_CHARS) == 1
        for one in held:
            one.may_end.set()
        await asyncio.gather(*tasks)

    run(scene())


@pytest.mark.parametrize("length", [LONG_CHARS, HUGE_CHARS])
def test_who_leaves_while_it_runs_stops_it(length: int) -> None:
    async def scene() -> None:
        work = Workshop()
        for _ in range(NUM_LONG + 1):
            held = Held()
            task = asyncio.create_task(work.run(held, length))
            await held.begun()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(held.was_abandoned.wait, TIMEOUT_S)

    run(scene())


def test_who_leaves_while_waiting_never_runs() -> None:
    async def scene() -> None:
        work, held, waiting = Workshop(), [Held() for _ in range(NUM_HUGE)], Held()
        tasks = [asyncio.create_task(work.run(one, HUGE_CHARS)) for one in held]
        for one in held:
            await one.begun()
        leaver = asyncio.create_task(work.run(waiting, HUGE_CHARS))
        await asyncio.sleep(0)
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        for one in held:
            one.may_end.set()
        await asyncio.gather(*tasks)
        assert await work.run(lambda _: 1, HUGE_CHARS) == 1
        assert not waiting.has_begun.is_set()

    run(scene())


def test_the_loops_own_threads_are_left_alone() -> None:
    """The supervisor of the engine uses them: they must be free during any conversion."""

    async def scene() -> None:
        work, held = Workshop(), [Held() for _ in range(100)]
        tasks = [asyncio.create_task(work.run(one, HUGE_CHARS)) for one in held]
        assert await asyncio.to_thread(lambda: 1) == 1
        for one in held:
            one.may_end.set()
        await asyncio.gather(*tasks)

    run(scene())


# ---- over HTTP

TEXT = "hello world " * 50_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": TEXT}),
        ("/v1/completions", {"prompt": TEXT, "truncate_prompt_tokens": 3}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": TEXT}]}),
    ],
)
def test_a_client_that_leaves_ends_the_encoding_of_its_text(
    live: Any, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    encode: Callable[..., list[int]] = tokenizer._encoded
    pieces: list[int] = []
    has_begun, may_go_on = threading.Event(), threading.Event()

    def noted(core: object, text: str) -> list[int]:
        pieces.append(len(text))
        has_begun.set()
        assert may_go_on.wait(TIMEOUT_S)
        return encode(core, text)

    monkeypatch.setattr(tokenizer, "_encoded", noted)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.sendall(head.encode() + data)
        assert has_begun.wait(TIMEOUT_S)
    live.wait_idle()
    may_go_on.set()
    for thread in threading.enumerate():
        if thread.name == "conversion":
            thread.join(TIMEOUT_S)
    assert len(pieces) == 1, "the rest was encoded for nobody"
    assert live.log_lines()[-1]["status"] == 499


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_cannot_fit_is_not_even_encoded(
    live: Any, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    def never(core: object, text: str) -> list[int]:
        raise AssertionError(f"{core}: {len(text)} characters were encoded")

    monkeypatch.setattr("server.text.tokenizer._encoded", never)
    body: dict[str, Any] = {"prompt": TEXT}
    if "chat" in path:
        body = {"messages": [{"role": "user", "content": TEXT}]}
    error = live.post(path, **body).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == ("messages" if "chat" in path else "prompt")
    assert "maximum context length is 256 tokens" in error["message"]


@pytest.mark.parametrize(
    "unit", [",", '","', '\\",', "[],"], ids=["bare", "quoted", "escaped", "json"]
)
def test_a_text_may_hold_any_number_of_commas(live: Any, unit: str) -> None:
    answer = live.post("/v1/completions", prompt=[unit * 600_000, "x"], truncate_prompt_tokens=1)
    assert answer.status_code == 400
    assert "without a border between words" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/detokenize", {"tokens": [1] * 600_000}),
        ("/v1/completions", {"prompt": [1] * 600_000}),
        ("/tokenize", {"prompt": "x", "chat_template_kwargs": {"a": [[]] * 600_000}}),
        ("/v1/responses", {"input": ["a"] * 600_000}),
    ],
)
def test_a_body_of_too_many_values_is_refused_unread(
    live: Any, path: str, body: dict[str, Any]
) -> None:
    error = live.post(path, **body).json()["error"]
    assert "more than the 524288 values" in error["message"]
