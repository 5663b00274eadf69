"""An engine that hangs is replaced like one that died."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from configs.schema import SchedulerSection
from model.fake import FakeRunner, fake_output
from model.interface import SamplingParams
from scheduler.client import GenerateRequest
from scheduler.process import ProcessClient
from scheduler.watchdog import Watchdog


class Kennel:
    """A watchdog, its clock, and how often it bit."""

    def __init__(self) -> None:
        self.now_s = 50.0
        self.is_owed = True
        self.num_bites = 0
        self.dog = Watchdog(8.0, lambda: self.is_owed, self._bite, lambda: self.now_s)

    def _bite(self) -> None:
        self.num_bites += 1

    def look(self, after_s: float) -> int:
        self.now_s += after_s
        self.dog.look()
        return self.num_bites


def test_silence_is_bitten_once_a_timeout() -> None:
    kennel = Kennel()
    assert [kennel.look(2.0) for _ in range(11)] == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2]


def test_a_sign_of_life_calms_it() -> None:
    kennel = Kennel()
    for _ in range(50):
        kennel.dog.heard()
        assert kennel.look(7.9) == 0


def test_who_owes_nothing_may_be_silent() -> None:
    kennel = Kennel()
    kennel.is_owed = False
    assert kennel.look(10_000.0) == 0
    kennel.is_owed = True
    assert [kennel.look(2.0) for _ in range(5)] == [0, 0, 0, 0, 1]


def test_it_is_never_early_for_work_that_came_between_two_looks() -> None:
    kennel = Kennel()
    kennel.is_owed = False
    kennel.look(0.0)
    kennel.is_owed = True
    # 8 s later something is owed for less than 8 s.
    assert kennel.look(8.0) == 0


def test_one_that_never_started_stops() -> None:
    Kennel().dog.stop()


_CONFIG = SchedulerSection(max_num_seqs=8, max_num_batched_tokens=32, engine_timeout_s=0.4)


async def _collect(client: ProcessClient, request: GenerateRequest) -> list[int]:
    return [token async for delta in client.generate(request) for token in delta.token_ids]


def _request(prompt: tuple[int, ...], max_tokens: int) -> GenerateRequest:
    return GenerateRequest(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))


def _run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


def test_a_hung_engine_is_replaced_and_its_streams_go_on_exactly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        client = ProcessClient(FakeRunner, _CONFIG)
        await client.start()
        prompts = [(1, 2, 3), (4, 5)]
        streams = [client.generate(_request(prompt, 200)) for prompt in prompts]
        told = [list((await anext(stream)).token_ids) for stream in streams]
        assert client.engine_pid is not None
        os.kill(client.engine_pid, signal.SIGSTOP)
        for tokens, stream in zip(told, streams, strict=True):
            tokens += [token async for delta in stream for token in delta.token_ids]
        assert told == [fake_output(prompt, 200) for prompt in prompts]
        assert client.is_alive
        await client.close()

    _run(test)
    assert "said nothing for 0.4 s" in caplog.text


def test_a_loop_that_is_stuck_in_a_full_pipe_is_freed() -> None:
    async def test() -> None:
        runner = partial(FakeRunner, max_model_len=100_000, num_pages=50_000, is_strict=False)
        client = ProcessClient(runner, _CONFIG)
        await client.start()
        assert client.engine_pid is not None
        os.kill(client.engine_pid, signal.SIGSTOP)
        # More than a pipe holds, to an engine that reads nothing.
        prompt = tuple(range(80_000))
        assert len(await _collect(client, _request(prompt, 1))) == 1
        assert client.num_restarts == 1
        await client.close()

    _run(test)


def test_closing_ends_the_thread() -> None:
    async def test() -> None:
        client = ProcessClient(FakeRunner, _CONFIG)
        await client.start()
        await client.close()
        thread = client._watchdog._thread
        assert thread is not None
        assert not thread.is_alive()

    _run(test)
