"""An engine that hangs, at work, idle or while it starts: it costs the API's event loop nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvloop

from configs.schema import SchedulerSection
from model.fake import FakeRunner, fake_output
from model.interface import ModelRunner, SamplingParams, StepInput
from scheduler.client import EngineUnavailableError, GenerateRequest
from scheduler.process import ProcessClient
from scheduler.watchdog import _NUM_TICKS, _PING_AFTER
from waiting import TIMEOUT_S

#: Far more than anything here takes on the loop, far less than a stopped engine would hold it up.
_LONGEST_LAG_S = 20.0


def _config(**section: Any) -> SchedulerSection:
    return SchedulerSection(**{"max_num_seqs": 8, "max_num_batched_tokens": 512} | section)


def _request(prompt: tuple[int, ...], max_tokens: int) -> GenerateRequest:
    return GenerateRequest(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))


async def _collect(client: ProcessClient, request: GenerateRequest) -> list[int]:
    return [token async for delta in client.generate(request) for token in delta.token_ids]


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - the engine next door sets no event of ours
            await asyncio.sleep(0.001)


def _run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await test()

    uvloop.run(bounded())


def _let_the_timeout_pass(client: ProcessClient) -> None:
    """Let the watchdog look as often as it does until it takes silence for a hang.

    By the clock it never does here: an engine that a busy machine keeps waiting does not hang.
    """
    for _ in range(_NUM_TICKS + _PING_AFTER):
        client._watchdog.look()


async def _hear(client: ProcessClient) -> None:
    """Let the watchdog look until it asks, and wait for the engine's answer."""
    for _ in range(_PING_AFTER):
        client._watchdog.look()
    await _until(lambda: client._watchdog._num_silent == 0)


def _stop(client: ProcessClient) -> int:
    assert client._engine is not None
    os.kill(client._engine.pid, signal.SIGSTOP)
    return client._engine.pid


@asynccontextmanager
async def _watched_loop() -> AsyncIterator[None]:
    """Fail if the loop stands still for long, whatever the block does."""
    lags: list[float] = []

    async def tick() -> None:
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(0.01)
            lags.append(time.monotonic() - before_s - 0.01)

    ticking = asyncio.create_task(tick())
    try:
        yield
    finally:
        # So that a lag that lasts to the end counts too.
        await asyncio.sleep(0.02)
        ticking.cancel()
    assert max(lags) < _LONGEST_LAG_S, f"the loop stood still for {max(lags):.2f} s"


_LARGE = partial(FakeRunner, max_model_len=200_000, num_pages=60_000, is_strict=False)


@pytest.mark.parametrize(
    "prompts",
    [[4000] * 60, [150_000] * 3, [10] * 2000],
    ids=["60 of 4000 ids", "3 of 150000", "2000 short ones"],
)
def test_a_stopped_engine_holds_up_neither_the_loop_nor_the_end(prompts: list[int]) -> None:
    async def test() -> None:
        client = ProcessClient(_LARGE, _config(), stop_timeout_s=0.5)
        await client.start()
        _stop(client)
        async with _watched_loop():
            tasks = [
                asyncio.create_task(_collect(client, _request(tuple(range(length)), 1)))
                for length in prompts
            ]
            await asyncio.sleep(0.1)
            # A third leaves: their cancellations are sent, or nothing of them.
            for task in tasks[::3]:
                task.cancel()
            await asyncio.sleep(0.1)
            await client.close()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        kinds = {asyncio.CancelledError, EngineUnavailableError}
        assert {type(end) for end in ends} == kinds

    _run(test)


def test_what_a_stopped_engine_was_sent_is_served_once_it_goes_on() -> None:
    async def test() -> None:
        client = ProcessClient(_LARGE, _config(max_queue=5000))
        await client.start()
        pid = _stop(client)
        prompts = [(i % 60, *range(4000)) for i in range(60)]
        expected = [fake_output(prompt, 2) for prompt in prompts]
        async with _watched_loop():
            tasks = [asyncio.create_task(_collect(client, _request(p, 2))) for p in prompts]
            await asyncio.sleep(0.1)
            os.kill(pid, signal.SIGCONT)
            assert await asyncio.gather(*tasks) == expected
            await client.close()
        assert client.num_restarts == 0

    _run(test)


def test_an_engine_that_hangs_at_work_is_replaced_and_its_streams_go_on_exactly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        client = ProcessClient(FakeRunner, _config())
        await client.start()
        prompts = [(1, 2, 3), (4, 5)]
        async with _watched_loop():
            streams = [client.generate(_request(prompt, 200)) for prompt in prompts]
            told = [list((await anext(stream)).token_ids) for stream in streams]
            _stop(client)
            _let_the_timeout_pass(client)
            for tokens, stream in zip(told, streams, strict=True):
                tokens += [token async for delta in stream for token in delta.token_ids]
        assert told == [fake_output(prompt, 200) for prompt in prompts]
        assert client.num_restarts == 1
        await client.close()

    _run(test)
    assert "said nothing for 300 s" in caplog.text


class _HangsWhenIdle(FakeRunner):
    """Its loop stands still once the marker exists, while its other threads go on."""

    def __init__(self, marker: Path) -> None:
        super().__init__()
        self._marker = marker
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()

    def idle(self) -> bool:
        if self._marker.exists():
            self._marker.unlink()
            time.sleep(1000)
        return True


@pytest.mark.parametrize("kind", ["stopped", "hung"])
def test_an_idle_engine_that_hangs_is_found_and_replaced_without_a_request(
    kind: str, tmp_path: Path
) -> None:
    marker = tmp_path / "hangs"

    async def test() -> None:
        client = ProcessClient(partial(_HangsWhenIdle, marker), _config())
        await client.start()
        # Alive for more than a timeout, though no request comes.
        for _ in range(_NUM_TICKS):
            await _hear(client)
            assert client.is_alive
        if kind == "stopped":
            _stop(client)
        else:
            marker.touch()
            await _until(lambda: not marker.exists())
        _let_the_timeout_pass(client)
        await _until(lambda: client.num_restarts == 1 and client.is_alive)
        assert await _collect(client, _request((1, 2), 3)) == fake_output((1, 2), 3)
        await client.close()

    _run(test)


def _build_for_ever(marker: Path) -> ModelRunner:
    """Block while building the first engine that finds the marker."""
    if marker.exists():
        marker.unlink()
        time.sleep(1000)
    return FakeRunner()


def test_a_first_start_that_hangs_fails_and_says_so(tmp_path: Path) -> None:
    marker = tmp_path / "hangs"
    marker.touch()

    async def test() -> None:
        config = _config(engine_start_timeout_s=0.5)
        client = ProcessClient(partial(_build_for_ever, marker), config)
        async with _watched_loop():
            with pytest.raises(EngineUnavailableError, match=r"not ready 0\.5 s after its start"):
                await client.start()
            await client.close()
        assert client._engine is not None
        assert client._engine.exit_code == -signal.SIGKILL

    _run(test)


def test_a_replacement_that_hangs_while_it_starts_is_replaced_too(tmp_path: Path) -> None:
    marker = tmp_path / "hangs"
    clients: list[ProcessClient] = []

    async def test() -> None:
        client = ProcessClient(partial(_build_for_ever, marker), _config(), sleep=relent)
        clients.append(client)
        await client.start()
        stream = client.generate(_request((1, 2, 3), 200))
        told = list((await anext(stream)).token_ids)
        marker.touch()
        client._config = _config(engine_start_timeout_s=2.0)
        assert client.engine_pid is not None
        os.kill(client.engine_pid, signal.SIGKILL)
        async for delta in stream:
            told += delta.token_ids
        assert told == fake_output((1, 2, 3), 200)
        await client.close()

    async def relent(_: float) -> None:
        """Allow for a start on a busy machine, and for all time once one has hung."""
        [client] = clients
        allowed_s = 2 * client._config.engine_start_timeout_s if marker.exists() else 1000.0
        client._config = _config(engine_start_timeout_s=allowed_s)

    _run(test)


def test_a_process_that_cannot_be_ended_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """As one that waits for a disk that does not answer: no signal reaches it."""

    async def test() -> None:
        client = ProcessClient(FakeRunner, _config(), stop_timeout_s=0.1)
        await client.start()
        engine = client._engine
        assert engine is not None
        pid = _stop(client)
        kill, engine._process.kill = engine._process.kill, lambda: None  # type: ignore[method-assign]
        async with _watched_loop():
            await client.close()
        engine._process.kill = kill  # type: ignore[method-assign]
        engine.kill()
        os.kill(pid, signal.SIGCONT)
        await engine.end(TIMEOUT_S)

    _run(test)
    assert "cannot be killed" in caplog.text


class _SleepyRunner(FakeRunner):
    """A step takes longer than the silence after which an engine is probed."""

    def launch(self, step: StepInput) -> Any:
        time.sleep(0.3)
        return super().launch(step)


def test_a_long_step_is_no_hang() -> None:
    async def test() -> None:
        client = ProcessClient(_SleepyRunner, _config())
        await client.start()
        asked = asyncio.create_task(_collect(client, _request((1, 2), 3)))
        while not asked.done():
            await _hear(client)
        assert await asked == fake_output((1, 2), 3)
        assert client.num_restarts == 0
        await client.close()

    _run(test)
