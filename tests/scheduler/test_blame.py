"""Blame for a crash: only on a request that ran alone in two crashes, never on its neighbours."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest

from configs.schema import SchedulerSection
from model.fake import FakeRunner, fake_output
from model.interface import Constraint, SamplingParams, StepInput
from scheduler.client import EngineFaultError, GenerateRequest
from scheduler.process import ProcessClient
from waiting import TIMEOUT_S

_CONFIG = SchedulerSection(max_num_seqs=32, max_num_batched_tokens=256)
_POISON = 63
_DEADLY_GRAMMAR = 'start: "deadly"'
_SHORT, _LONG = 40, 200


class _DeadlyRunner(FakeRunner):
    """Takes the whole process with it when it meets a certain token or grammar."""

    def launch(self, step: StepInput) -> Any:
        if _POISON in step.token_ids:
            os._exit(3)
        return super().launch(step)

    def prepare(self, grammar: str) -> Future[Constraint]:
        if grammar == _DEADLY_GRAMMAR:
            os._exit(3)
        return super().prepare(grammar)


class _HangingRunner(FakeRunner):
    """Stands still when it meets a certain token."""

    def launch(self, step: StepInput) -> Any:
        if _POISON in step.token_ids:
            signal.sigwait([signal.SIGUSR1])
        return super().launch(step)


class _DeadlyInCompanyRunner(FakeRunner):
    """Crashes when three sequences run side by side, whichever they are."""

    def launch(self, step: StepInput) -> Any:
        if len(step.rows) >= 3:
            os._exit(3)
        return super().launch(step)


class _SlowRunner(FakeRunner):
    """Leaves a moment between two tokens in which to kill it."""

    def launch(self, step: StepInput) -> Any:
        signal.sigtimedwait([], 0.001)
        return super().launch(step)


def _runner(kind: type[FakeRunner]) -> Callable[[], FakeRunner]:
    return partial(kind, num_pages=4096, is_strict=False)


def _is_harmless(prompt: tuple[int, ...], num_tokens: int) -> bool:
    return _POISON not in fake_output(prompt, num_tokens)


def _innocents(number: int, num_tokens: int) -> list[tuple[int, ...]]:
    """Return prompts after which no token is poison."""
    prompts = ((i, i // 50, 7) for i in range(1, 10_000) if _POISON not in (i, i // 50))
    harmless = (p for p in ((a % 50, b, c) for a, b, c in prompts) if _is_harmless(p, num_tokens))
    return [next(harmless) for _ in range(number)]


def _run(
    kind: type[FakeRunner],
    test: Callable[[ProcessClient], Awaitable[None]],
    config: SchedulerSection = _CONFIG,
) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            client = ProcessClient(_runner(kind), config)
            await client.start()
            try:
                await test(client)
                while not client.is_alive:  # noqa: ASYNC110 - the engine sets no event of ours
                    await asyncio.sleep(0.001)
                client.check()
                assert not client._isolation.is_on
            finally:
                await client.close()

    asyncio.run(bounded())


def _ask(
    client: ProcessClient, prompt: tuple[int, ...], num_tokens: int, grammar: str | None = None
) -> asyncio.Task[list[int]]:
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, grammar=grammar)

    async def collect() -> list[int]:
        deltas = client.generate(GenerateRequest(prompt, params))
        tokens: list[int] = []
        async for delta in deltas:
            tokens += delta.token_ids
            client.check()
        return tokens

    return asyncio.create_task(collect())


async def _kill(client: ProcessClient) -> None:
    """Kill the engine as soon as there is one that serves, and wait until that is noticed."""
    while not client.is_alive:  # noqa: ASYNC110 - the engine next door sets no event of ours
        await asyncio.sleep(0.001)
    num_restarts = client.num_restarts
    assert client.engine_pid is not None
    os.kill(client.engine_pid, signal.SIGKILL)
    while client.num_restarts == num_restarts:  # noqa: ASYNC110 - as above
        await asyncio.sleep(0.001)


#: A prompt that is poison, one that brings it about after some tokens, and a grammar that is.
_LATER = next(
    p
    for p in ((i, j) for i in range(60) for j in range(60))
    if not _is_harmless(p, 30) and _is_harmless(p, 8)
)


@pytest.mark.parametrize(
    ("poison", "place"),
    [
        (((_POISON, 14), None), 0),
        (((_POISON, 14), None), 31),
        ((_LATER, None), 31),
        (((1, 2), _DEADLY_GRAMMAR), 0),
    ],
    ids=["first", "last", "after some tokens", "while a grammar is made ready"],
)
def test_of_32_exactly_the_one_that_engines_die_of_is_ended(poison: Any, place: int) -> None:
    async def test(client: ProcessClient) -> None:
        prompt, grammar = poison
        prompts = _innocents(31, _SHORT)
        tasks = [_ask(client, innocent, _SHORT) for innocent in prompts[:place]]
        guilty = _ask(client, prompt, _SHORT, grammar)
        tasks += [_ask(client, innocent, _SHORT) for innocent in prompts[place:]]
        with pytest.raises(EngineFaultError, match="twice"):
            await guilty
        assert await asyncio.gather(*tasks) == [fake_output(p, _SHORT) for p in prompts]
        # Two of all, two alone, and one beside which the one before may still have run.
        assert client.num_restarts <= 5

    _run(_DeadlyRunner, test)


def test_two_among_many_are_both_found() -> None:
    async def test(client: ProcessClient) -> None:
        prompts = _innocents(6, _SHORT)
        guilty = [_ask(client, (_POISON, i), _SHORT) for i in range(2)]
        tasks = [_ask(client, prompt, _SHORT) for prompt in prompts]
        ends = await asyncio.gather(*guilty, return_exceptions=True)
        assert [type(end) for end in ends] == [EngineFaultError, EngineFaultError]
        assert await asyncio.gather(*tasks) == [fake_output(p, _SHORT) for p in prompts]

    _run(_DeadlyRunner, test)


def test_one_that_engines_hang_in_is_found_too() -> None:
    config = SchedulerSection(max_num_seqs=8, max_num_batched_tokens=256, engine_timeout_s=5)

    async def test(client: ProcessClient) -> None:
        prompts = _innocents(3, _SHORT)
        guilty = _ask(client, (_POISON, 14), _SHORT)
        tasks = [_ask(client, prompt, _SHORT) for prompt in prompts]
        with pytest.raises(EngineFaultError, match="twice"):
            await guilty
        assert await asyncio.gather(*tasks) == [fake_output(p, _SHORT) for p in prompts]

    _run(_HangingRunner, test, config)


def test_who_only_waited_is_no_suspect() -> None:
    """One sequence runs at a time, so all others wait."""
    config = SchedulerSection(max_num_seqs=1, max_num_batched_tokens=32)

    async def test(client: ProcessClient) -> None:
        guilty = _ask(client, (_POISON, 14), 3)
        prompts = _innocents(3, 3)
        tasks = [_ask(client, prompt, 3) for prompt in prompts]
        with pytest.raises(EngineFaultError, match="twice"):
            await guilty
        assert await asyncio.gather(*tasks) == [fake_output(prompt, 3) for prompt in prompts]
        assert client.num_restarts == 2

    _run(_DeadlyRunner, test, config)


def test_where_nobody_is_guilty_alone_all_are_served() -> None:
    async def test(client: ProcessClient) -> None:
        prompts = _innocents(4, _SHORT)
        tasks = [_ask(client, prompt, _SHORT) for prompt in prompts]
        assert await asyncio.gather(*tasks) == [fake_output(p, _SHORT) for p in prompts]

    _run(_DeadlyInCompanyRunner, test)


@pytest.mark.parametrize("number", [1, 32])
def test_two_kills_in_a_row_end_nobody(number: int) -> None:
    async def test(client: ProcessClient) -> None:
        prompts = _innocents(number, 0)
        tasks = [_ask(client, prompt, _LONG) for prompt in prompts]
        await asyncio.sleep(0.01)
        for _ in range(2):
            await _kill(client)
        assert await asyncio.gather(*tasks) == [fake_output(p, _LONG) for p in prompts]

    _run(_SlowRunner, test)


@pytest.mark.parametrize("seed", range(3))
def test_kills_at_any_moment_lose_no_token(seed: int) -> None:
    """Among them of engines that are not ready yet, or that run a suspect alone."""
    chance = random.Random(seed)

    async def kill_again_and_again(client: ProcessClient) -> None:
        for _ in range(6):
            await asyncio.sleep(chance.choice([0.0, 0.01, 0.1, 0.5, 1.0]))
            assert client._engine is not None
            if client._engine.exit_code is None:
                os.kill(client._engine.pid, signal.SIGKILL)

    async def test(client: ProcessClient) -> None:
        prompts = _innocents(32, 0)
        tasks = [_ask(client, prompt, _LONG) for prompt in prompts]
        await kill_again_and_again(client)
        assert await asyncio.gather(*tasks) == [fake_output(p, _LONG) for p in prompts]

    _run(_SlowRunner, test)
