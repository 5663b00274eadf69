"""Of whom an engine died: those it had begun with, and nobody who only waited."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from configs.schema import SchedulerSection
from model.fake import FakeRunner, fake_output
from model.interface import Constraint, SamplingParams, StepInput
from scheduler.client import EngineFaultError, GenerateRequest
from scheduler.process import ProcessClient

#: One at a time, so that whoever is not the first waits.
_CONFIG = SchedulerSection(max_num_seqs=1, max_num_batched_tokens=32)
_POISON = 13
_DEADLY_GRAMMAR = 'start: "deadly"'


class _DeadlyRunner(FakeRunner):
    """Takes the whole process with it, once it may, when it meets a certain token or grammar."""

    def launch(self, step: StepInput) -> Any:
        if _POISON in step.token_ids:
            _die()
        return super().launch(step)

    def prepare(self, grammar: str) -> Future[Constraint]:
        if grammar == _DEADLY_GRAMMAR:
            _die()
        return super().prepare(grammar)


def _die() -> None:
    folder = Path(os.environ["DEADLY_FOLDER"])
    (folder / "about to die").touch()
    while not (folder / "may die").exists():
        time.sleep(0.001)
    os._exit(3)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEADLY_FOLDER", str(tmp_path))
    return tmp_path


def _run(test: Callable[[ProcessClient], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            client = ProcessClient(_DeadlyRunner, _CONFIG)
            await client.start()
            try:
                await test(client)
                client.check()
            finally:
                await client.close()

    asyncio.run(bounded())


def _ask(
    client: ProcessClient, prompt: tuple[int, ...], grammar: str | None = None
) -> asyncio.Task[list[int]]:
    params = SamplingParams(max_tokens=3, ignore_eos=True, grammar=grammar)

    async def collect() -> list[int]:
        deltas = client.generate(GenerateRequest(prompt, params))
        return [token async for delta in deltas for token in delta.token_ids]

    return asyncio.create_task(collect())


_INNOCENT = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]


@pytest.mark.parametrize(
    "poison",
    [((_POISON, 14), None), ((1, 2), _DEADLY_GRAMMAR)],
    ids=["in a step", "while a grammar is made ready"],
)
def test_those_that_waited_outlive_the_one_it_died_of(folder: Path, poison: Any) -> None:
    async def test(client: ProcessClient) -> None:
        guilty = _ask(client, *poison)
        tasks = [_ask(client, prompt) for prompt in _INNOCENT]
        # Each has been sent by now, and none of them can be answered.
        await asyncio.sleep(0)
        (folder / "may die").touch()
        with pytest.raises(EngineFaultError, match="twice"):
            await guilty
        assert await asyncio.gather(*tasks) == [fake_output(prompt, 3) for prompt in _INNOCENT]
        assert client.num_restarts == 2

    _run(test)


def test_what_an_engine_said_last_counts_also_where_its_end_shows_first_in_sending(
    folder: Path,
) -> None:
    async def test(client: ProcessClient) -> None:
        guilty = _ask(client, (_POISON, 14))
        await asyncio.sleep(0)
        # From here on nothing is read until something is sent.
        while not (folder / "about to die").exists():
            time.sleep(0.001)  # noqa: ASYNC251 - that the loop stands still is the point
        (folder / "may die").touch()
        assert client._process is not None
        client._process.join()
        innocent = _ask(client, (1, 2, 3))
        await asyncio.sleep(0)
        blamed = [stream.num_crashes for stream in client._streams.unfinished()]
        assert blamed == [1, 0]
        with pytest.raises(EngineFaultError, match="twice"):
            await guilty
        assert await innocent == fake_output((1, 2, 3), 3)

    _run(test)


def test_where_an_engine_had_begun_with_nobody_all_are_suspects(folder: Path) -> None:
    del folder

    async def test(client: ProcessClient) -> None:
        assert client._process is not None
        client._process.kill()
        client._process.join()
        task = _ask(client, (1, 2, 3))
        await asyncio.sleep(0)
        assert [stream.num_crashes for stream in client._streams.unfinished()] == [1]
        assert await task == fake_output((1, 2, 3), 3)

    _run(test)
