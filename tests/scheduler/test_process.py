"""An engine in its own process: crashes, hangs, failed starts, restarts."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
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
from scheduler.client import EngineFaultError, EngineUnavailableError, GenerateRequest
from scheduler.engine_main import engine_main
from scheduler.messages import Build
from scheduler.process import ProcessClient
from waiting import TIMEOUT_S

_CONFIG = SchedulerSection(max_num_seqs=8, max_num_batched_tokens=32)


def _request(prompt: tuple[int, ...], max_tokens: int = 10) -> GenerateRequest:
    return GenerateRequest(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))


async def _collect(client: ProcessClient, request: GenerateRequest) -> list[int]:
    return [token async for delta in client.generate(request) for token in delta.token_ids]


@asynccontextmanager
async def _running(client: ProcessClient) -> AsyncIterator[ProcessClient]:
    await client.start()
    try:
        yield client
        client.check()
    finally:
        await client.close()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - the engine next door sets no event of ours
            await asyncio.sleep(0.001)


async def _no_time(_: float) -> None:
    """Replace a pause: others have their turn."""
    await asyncio.sleep(0)


def _run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await test()

    asyncio.run(bounded())


def _kill(client: ProcessClient) -> None:
    """Kill the engine and wait for its end, before the event loop notices it."""
    assert client.engine_pid is not None
    os.kill(client.engine_pid, signal.SIGKILL)
    os.waitid(os.P_PID, client.engine_pid, os.WEXITED | os.WNOWAIT)


def test_a_killed_engine_is_replaced_and_streams_go_on_exactly() -> None:
    async def test() -> None:
        client = ProcessClient(FakeRunner, _CONFIG)
        async with _running(client):
            prompts = [tuple(range(i, i + 5)) for i in range(6)]
            tasks = [
                asyncio.create_task(_collect(client, _request(prompt, 240))) for prompt in prompts
            ]
            await _until(lambda: client.stats().scheduler.steps_total > 20)
            assert client.engine_pid is not None
            os.kill(client.engine_pid, signal.SIGKILL)
            assert await asyncio.gather(*tasks) == [fake_output(p, 240) for p in prompts]
            assert client.num_restarts == 1
            assert client.is_alive

    _run(test)


class _DeadlyRunner(FakeRunner):
    """Takes the whole process with it when it meets token 13."""

    def launch(self, step: StepInput) -> Any:
        if 13 in step.token_ids:
            os._exit(3)
        return super().launch(step)


def test_a_request_that_kills_engines_is_blamed_and_others_live() -> None:
    async def test() -> None:
        client = ProcessClient(_DeadlyRunner, _CONFIG)
        async with _running(client):
            with pytest.raises(EngineFaultError, match="twice"):
                await _collect(client, _request((13, 14)))
            await _until(lambda: client.is_alive)
            assert await _collect(client, _request((1, 2, 3), 2)) == fake_output((1, 2, 3), 2)

    _run(test)


class _RestlessRunner(FakeRunner):
    """Would use any moment without work, and leaves a mark that it had one."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def idle(self) -> bool:
        (self._folder / "mark").touch()
        return True


def test_a_moment_without_work_is_the_runners_until_a_request_comes(tmp_path: Path) -> None:
    async def test() -> None:
        async with _running(ProcessClient(partial(_RestlessRunner, tmp_path), _CONFIG)) as client:
            await _until((tmp_path / "mark").exists)
            assert await _collect(client, _request((1, 2))) == fake_output((1, 2), 10)

    _run(test)


def _cannot_build() -> ModelRunner:
    raise ValueError("kv_cache_memory: 1 KiB is too little")


def test_an_engine_that_cannot_start_says_why() -> None:
    async def test() -> None:
        client = ProcessClient(_cannot_build, _CONFIG)
        with pytest.raises(EngineUnavailableError, match="1 KiB is too little"):
            await client.start()
        assert not client.is_alive
        await client.close()

    _run(test)


class _DiesOnceReady(FakeRunner):
    def launch(self, step: StepInput) -> Any:
        os._exit(len(step.rows))


def test_engines_that_die_at_once_are_given_up_after_a_few() -> None:
    async def test() -> None:
        client = ProcessClient(_DiesOnceReady, _CONFIG, sleep=_no_time)
        lost = asyncio.Event()
        client.on_lost = lost.set
        await client.start()
        while not lost.is_set():
            try:
                await _collect(client, _request((1, 2)))
            except (EngineFaultError, EngineUnavailableError):
                await asyncio.sleep(0.01)
        assert not client.is_alive
        await client.close()

    _run(test)


def test_a_client_that_never_started_knows_nothing_and_closes() -> None:
    async def test() -> None:
        client = ProcessClient(FakeRunner, _CONFIG)
        assert client.engine_pid is None
        with pytest.raises(EngineUnavailableError):
            _ = client.info
        await client.close()

    _run(test)


def _die_building() -> ModelRunner:
    os._exit(4)


def test_an_engine_that_dies_while_it_starts_tells_its_exit_code() -> None:
    async def test() -> None:
        client = ProcessClient(_die_building, _CONFIG)
        with pytest.raises(EngineUnavailableError, match="exit code 4"):
            await client.start()

    _run(test)


def test_a_request_sent_into_a_dead_engines_pipe_is_served_by_the_next() -> None:
    async def test() -> None:
        async with _running(ProcessClient(FakeRunner, _CONFIG)) as client:
            _kill(client)
            assert await _collect(client, _request((1, 2, 3))) == fake_output((1, 2, 3), 10)

    _run(test)


def test_more_than_the_pipe_holds_is_sent_whole_under_uvloop_too() -> None:
    """uvloop makes the pipe non-blocking; half a message would have ended the engine."""

    async def test() -> None:
        runner = partial(FakeRunner, max_model_len=200_000, num_pages=50_000, is_strict=False)
        async with _running(ProcessClient(runner, _CONFIG)) as client:
            prompts = [tuple(range(i, i + 100_000)) for i in range(4)]
            tasks = [asyncio.create_task(_collect(client, _request(p, 1))) for p in prompts]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert client.is_alive
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            assert await _collect(client, _request((1, 2, 3))) == fake_output((1, 2, 3), 10)
        assert client.num_restarts == 0

    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await test()

    uvloop.run(bounded())


def test_an_engine_found_dead_when_closing_is_not_replaced() -> None:
    async def test() -> None:
        async with _running(ProcessClient(FakeRunner, _CONFIG)) as client:
            _kill(client)
        assert client.num_restarts == 0

    _run(test)


def test_an_engine_that_gives_up_is_replaced_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        # The request with others, alone, and the probe: then no request is at fault.
        runner = partial(FakeRunner, faulty_steps=frozenset({5, 6, 7}))
        async with _running(ProcessClient(runner, _CONFIG)) as client:
            assert await _collect(client, _request((1, 2, 3))) == fake_output((1, 2, 3), 10)
            assert client.num_restarts == 1
        assert "ModelFaultError" in caplog.text

    _run(test)


def _build_once(marker: Path) -> ModelRunner:
    if marker.exists():
        raise ValueError("only once")
    marker.touch()
    return FakeRunner()


def test_an_engine_that_does_not_come_back_ends_its_streams(tmp_path: Path) -> None:
    async def test() -> None:
        lost = asyncio.Event()
        client = ProcessClient(partial(_build_once, tmp_path / "built"), _CONFIG, sleep=_no_time)
        client.on_lost = lost.set
        async with _running(client):
            stream = client.generate(_request((1, 2, 3), 240))
            await anext(stream)
            _kill(client)
            with pytest.raises(EngineUnavailableError, match="did not come back"):
                [delta async for delta in stream]
            await lost.wait()

    _run(test)


class _HangingRunner(FakeRunner):
    def launch(self, step: StepInput) -> Any:
        Path(os.environ["HANGING_MARKER"]).touch()
        time.sleep(1000 * len(step.rows))


def test_an_engine_that_hangs_is_killed_when_closing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "stuck"
    monkeypatch.setenv("HANGING_MARKER", str(marker))

    async def test() -> None:
        client = ProcessClient(_HangingRunner, _CONFIG, stop_timeout_s=0.2)
        async with _running(client):
            task = asyncio.create_task(_collect(client, _request((1, 2))))
            await _until(marker.exists)
        with pytest.raises(EngineUnavailableError, match="closed"):
            await task
        assert client._engine is not None
        assert client._engine.exit_code == -signal.SIGKILL

    _run(test)


def test_closing_while_an_engine_is_being_replaced() -> None:
    async def test() -> None:
        async with _running(ProcessClient(FakeRunner, _CONFIG)) as client:
            stream = client.generate(_request((1, 2, 3), 240))
            await anext(stream)
            _kill(client)
            await _until(lambda: not client.is_alive)
            # No engine is left to be notified that the reader leaves.
            await stream.aclose()

    _run(test)


def _build_for_ever(marker: Path) -> ModelRunner:
    marker.touch()
    time.sleep(1000)
    return FakeRunner()


def test_closing_does_not_wait_for_a_model_that_is_being_built(tmp_path: Path) -> None:
    async def test() -> None:
        marker = tmp_path / "building"
        build = partial(_build_for_ever, marker)
        client = ProcessClient(build, _CONFIG, stop_timeout_s=1000.0)
        starting = asyncio.create_task(client.start())
        await _until(marker.exists)
        starting.cancel()
        await client.close()
        assert client._engine is not None
        assert client._engine.exit_code == -signal.SIGKILL

    _run(test)


def test_an_engine_whose_api_is_gone_does_not_go_on_building(tmp_path: Path) -> None:
    async def test() -> None:
        marker = tmp_path / "building"
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=engine_main, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        ours.send(Build(partial(_build_for_ever, marker), _CONFIG))
        await _until(marker.exists)
        ours.close()
        try:
            await _until(lambda: not process.is_alive())
        finally:
            process.kill()

    _run(test)


def test_engines_that_only_fail_requests_are_given_up() -> None:
    async def test() -> None:
        runner = partial(FakeRunner, faulty_steps=frozenset(range(100)))
        client = ProcessClient(runner, _CONFIG)
        lost = asyncio.Event()
        client.on_lost = lost.set
        async with _running(client):
            while not lost.is_set():
                try:
                    await _collect(client, _request((1, 2)))
                except (EngineFaultError, EngineUnavailableError):
                    await asyncio.sleep(0.01)

    _run(test)


def test_engines_that_come_and_go_leave_no_file_descriptors() -> None:
    async def test() -> None:
        async with _running(ProcessClient(FakeRunner, _CONFIG)) as client:
            held = []
            for _ in range(3):
                _kill(client)
                await _collect(client, _request((1, 2)))
                # So that no object of an earlier test is collected within this one.
                gc.collect()
                held.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208 - no disk
            # Fewer where something of an earlier test was collected meanwhile.
            assert held[-1] <= held[0]
            assert client.num_restarts == 3

    _run(test)
