from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from event_streams import chunks_of
from scheduler.client import FinishReason, GenerateRequest, Started, TokenOutput
from server.http import lifecycle as lifecycle_module
from server.http.lifecycle import Lifecycle
from waiting import TIMEOUT_S


class Held:
    """A script whose request goes on when a test releases it."""

    def __init__(self) -> None:
        self._release: asyncio.Event | None = None
        self.has_begun = threading.Event()

    async def __call__(
        self, _: object, request: GenerateRequest
    ) -> AsyncGenerator[TokenOutput, None]:
        del request
        self._release = asyncio.Event()
        yield TokenOutput((72,), started=Started(1, 0.0, 0))
        self.has_begun.set()
        await self._release.wait()
        yield TokenOutput((105,), finish_reason=FinishReason.LENGTH)

    async def release(self) -> None:
        assert self._release is not None
        self._release.set()


def test_while_draining_new_requests_are_refused_and_running_ones_finish(
    scripted: Callable[..., Any],
) -> None:
    held = Held()
    live = scripted(held)
    with ThreadPoolExecutor() as threads:
        running = threads.submit(live.chat, stream=True)
        assert held.has_begun.wait(TIMEOUT_S)
        live.loop.call_soon_threadsafe(live.lifecycle.begin_drain)
        refused = live.chat()
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert refused.headers["connection"] == "close"
        ready = live.http.get("/ready")
        assert ready.status_code == 503
        assert "shutting down" in ready.json()["error"]["message"]
        assert "retry-after" in ready.headers
        assert live.http.get("/health").status_code == 200
        assert not live.call(live.lifecycle.wait_idle(0))
        assert live.lifecycle.num_in_flight == 1
        assert live.lifecycle.is_draining
        live.call(held.release())
        assert live.call(live.lifecycle.drain(TIMEOUT_S)), "the running request finishes"
        assert running.result(TIMEOUT_S).text.endswith("data: [DONE]\n\n")
    assert live.lifecycle.num_in_flight == 0


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_what_takes_too_long_is_ended_and_told(
    scripted: Callable[..., Any], is_stream: bool
) -> None:
    held = Held()
    live = scripted(held)
    with ThreadPoolExecutor() as threads:
        running = threads.submit(live.chat, stream=is_stream)
        assert held.has_begun.wait(TIMEOUT_S)
        assert not live.call(live.lifecycle.drain(0))
        answer = running.result(TIMEOUT_S)
    assert live.client.was_closed.is_set(), "the engine is told"
    if is_stream:
        error = chunks_of(answer.content)[-1]["error"]
    else:
        assert answer.status_code == 503
        error = answer.json()["error"]
    assert "shutting down" in error["message"]
    assert live.log_lines()[-1]["finish_reason"] == "abort"


def test_a_request_that_waits_in_the_engines_queue_is_ended_too(
    scripted: Callable[..., Any],
) -> None:
    async def silent(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        del request
        await asyncio.Event().wait()
        yield TokenOutput()

    live = scripted(silent)
    with ThreadPoolExecutor() as threads:
        running = threads.submit(live.chat, stream=True)
        assert live.client.was_asked.wait(TIMEOUT_S)
        assert not live.call(live.lifecycle.drain(0))
        assert running.result(TIMEOUT_S).status_code == 503


def test_what_cannot_be_ended_does_not_hold_up_a_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle_module, "_END_TIMEOUT_S", 0.01)

    async def run() -> None:
        lifecycle, may_end = Lifecycle(), asyncio.Event()

        async def stubborn() -> None:
            with lifecycle.request():
                while not may_end.is_set():
                    with suppress(asyncio.CancelledError):
                        await may_end.wait()

        task = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        async with asyncio.timeout(TIMEOUT_S):
            assert not await lifecycle.drain(0)
        assert lifecycle.num_in_flight == 1
        may_end.set()
        await task

    asyncio.run(run())


def test_requests_are_counted_exactly() -> None:
    async def run() -> None:
        lifecycle = Lifecycle()
        assert await lifecycle.wait_idle(0)
        with lifecycle.request():
            with lifecycle.request(), lifecycle.request(is_counted=False):
                assert lifecycle.num_in_flight == 2
                lifecycle.check()
            assert not await lifecycle.wait_idle(0)
        lifecycle.check()
        assert await lifecycle.drain(0)
        assert lifecycle.is_draining

    asyncio.run(run())


def test_a_cancellation_from_elsewhere_stays_one() -> None:
    async def run() -> None:
        lifecycle = Lifecycle()
        is_inside = asyncio.Event()

        async def answer() -> None:
            with lifecycle.request() as interruption:
                async with interruption.reasoned():
                    is_inside.set()
                    await asyncio.Event().wait()

        task = asyncio.create_task(answer())
        await is_inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert lifecycle.num_in_flight == 0

    asyncio.run(run())


def test_only_the_first_interruption_counts() -> None:
    async def run() -> None:
        lifecycle = Lifecycle()
        is_inside = asyncio.Event()

        async def answer() -> None:
            with lifecycle.request() as interruption:
                async with interruption.reasoned():
                    is_inside.set()
                    await asyncio.Event().wait()

        with lifecycle.request() as idle:
            async with idle.reasoned():
                pass
            idle.interrupt(KeyError("too late"))
            task = asyncio.create_task(answer())
            await is_inside.wait()
            lifecycle.end_running()
            lifecycle.end_running()
            with pytest.raises(Exception, match="shutting down"):
                await task

    asyncio.run(run())
