"""Crashes of any cause: only the guilty requests are ended, no token is lost or sent twice.

The engine can be computed by hand: each running request gets a token a step, its position. A poison
request crashes it in the step that is to sample a certain token.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.interface import SamplingParams
from scheduler.client import EngineFaultError, GenerateRequest
from scheduler.isolation import Isolation
from scheduler.messages import Begun, Cancel, FinishReason, StepResult, Submit
from scheduler.streams import Streams

_PLACES = 4
_MOST_STEPS = 20_000


@dataclass
class _Engine:
    """Takes a message `delay` steps after it was sent: its outputs until then are out of date."""

    delay: int
    inbox: deque[tuple[int, Submit | Cancel]] = field(default_factory=deque)
    waiting: list[Submit] = field(default_factory=list)
    running: dict[int, Submit] = field(default_factory=dict)
    outputs: dict[int, list[int]] = field(default_factory=dict)
    num_steps: int = 0

    def send(self, message: Submit | Cancel) -> None:
        self.inbox.append((self.num_steps + self.delay, message))

    def listen(self) -> None:
        while self.inbox and self.inbox[0][0] <= self.num_steps:
            _, message = self.inbox.popleft()
            if isinstance(message, Submit):
                self.waiting.append(message)
            else:
                self.running.pop(message.request_id, None)
                self.waiting = [s for s in self.waiting if s.request_id != message.request_id]

    def begin(self) -> Begun | None:
        fresh = self.waiting[: _PLACES - len(self.running)]
        del self.waiting[: len(fresh)]
        for submit in fresh:
            self.running[submit.request_id] = submit
            self.outputs[submit.request_id] = list(submit.output_token_ids)
        return Begun(tuple(submit.request_id for submit in fresh)) if fresh else None

    def step(self) -> StepResult:
        ids = list(self.running)
        finished = []
        tokens = []
        for id_ in ids:
            tokens.append(len(self.outputs[id_]))
            self.outputs[id_].append(tokens[-1])
            if len(self.outputs[id_]) == self.running[id_].request.params.max_tokens:
                finished.append((id_, FinishReason.LENGTH))
                del self.running[id_]
        return StepResult(request_ids=ids, token_ids=tokens, finished=finished)


class _World:
    def __init__(self, poisons: list[int | None], num_tokens: int, delay: int) -> None:
        self.streams = Streams()
        self.isolation = Isolation(self.streams, self._send)
        #: By prompt: the token at which the engine crashes.
        self.poisons = poisons
        self.num_tokens = num_tokens
        self.delay = delay
        self.engine = _Engine(delay)
        self.num_deaths = 0
        self.isolation.begin()

    async def read(self, number: int, most_tokens: int | None = None) -> list[int]:
        params = SamplingParams(max_tokens=self.num_tokens)
        stream = self.streams.generate(GenerateRequest((number,), params), self.isolation.send)
        told: list[int] = []
        async for delta in stream:
            told += delta.token_ids
            if most_tokens is not None and len(told) >= most_tokens:
                break
        await stream.aclose()
        return told

    def _send(self, message: Submit | Cancel) -> None:
        self.engine.send(message)

    def step(self) -> None:
        engine = self.engine
        engine.num_steps += 1
        engine.listen()
        if begun := engine.begin():
            self.isolation.note_begun(begun)
        if any(self._is_deadly(submit) for submit in engine.running.values()):
            self.die(is_outside=False)
        elif engine.running:
            self.streams.dispatch(engine.step())
            self.isolation.advance()
        self.isolation.check()

    def _is_deadly(self, submit: Submit) -> bool:
        place = self.poisons[submit.request.prompt_token_ids[0]]
        return place is not None and len(self.engine.outputs[submit.request_id]) == place

    def die(self, *, is_outside: bool) -> None:
        self.num_deaths += 1
        self.isolation.end()
        self.isolation.judge(is_outside=is_outside)
        self.engine = _Engine(self.delay)
        self.isolation.begin()


async def _live(
    world: _World, tasks: list[asyncio.Task[list[int]]], kills: list[int], drops: dict[int, int]
) -> None:
    for number in range(_MOST_STEPS):
        for _ in range(3):
            await asyncio.sleep(0)
        if all(task.done() for task in tasks):
            return
        for index, when in drops.items():
            if when == number and index < len(tasks):
                tasks[index].cancel()
        if number in kills:
            world.die(is_outside=True)
        world.step()
    raise AssertionError("it does not end")


@settings(max_examples=150)
@given(
    poisons=st.lists(st.none() | st.integers(0, 59), min_size=1, max_size=12),
    num_tokens=st.integers(1, 60),
    delay=st.integers(0, 3),
    # Three kills of an engine with one request end no request; more in a row would.
    kills=st.lists(st.integers(0, 300), max_size=3),
    # Readers who leave after so many tokens, or in a certain step.
    leaves=st.lists(st.integers(1, 20) | st.none(), min_size=12, max_size=12),
    drops=st.dictionaries(st.integers(0, 11), st.integers(0, 200), max_size=6),
)
def test_exactly_the_guilty_are_ended(
    poisons: list[int | None],
    num_tokens: int,
    delay: int,
    kills: list[int],
    leaves: list[int | None],
    drops: dict[int, int],
) -> None:
    async def test() -> None:
        world = _World(poisons, num_tokens, delay)
        tasks = [
            asyncio.create_task(world.read(number, leaves[number]))
            for number in range(len(poisons))
        ]
        await _live(world, tasks, kills, drops)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        for poison, most_tokens, end in zip(poisons, leaves, ends, strict=False):
            if isinstance(end, asyncio.CancelledError):
                continue
            last = num_tokens if most_tokens is None else min(most_tokens, num_tokens)
            if poison is not None and poison < last:
                assert isinstance(end, EngineFaultError)
            else:
                assert isinstance(end, list)
                assert end == list(range(len(end)))
                assert last <= len(end) <= num_tokens
        assert not world.isolation.is_on
        # A cancelled request may also have crashed an engine that had not read the cancellation.
        num_poisons = len(poisons) - poisons.count(None)
        assert world.num_deaths <= 5 * num_poisons + 4 * len(kills)

    asyncio.run(test())


def test_one_that_comes_while_suspects_are_tried_waits_and_is_served() -> None:
    async def test() -> None:
        world = _World([None] * 4, 40, 0)
        tasks = [asyncio.create_task(world.read(number)) for number in range(3)]
        await asyncio.sleep(0)
        for _ in range(2):
            world.step()
            world.die(is_outside=True)
        assert world.isolation.is_on
        tasks.append(asyncio.create_task(world.read(3)))
        await _live(world, tasks, [], {})
        assert [task.result() for task in tasks] == [list(range(40))] * 4

    asyncio.run(test())


@pytest.mark.parametrize(("is_outside", "number"), [(True, 4), (False, 2)])
def test_how_often_an_engine_may_die_with_one_request(is_outside: object, number: int) -> None:
    async def test() -> None:
        world = _World([None, None], 100, 0)
        task = asyncio.create_task(world.read(0))
        for _ in range(number):
            await asyncio.sleep(0.001)
            assert not task.done()
            world.step()
            world.die(is_outside=bool(is_outside))
        with pytest.raises(EngineFaultError, match="twice or more"):
            await task
        # Where it has gone on in between, nothing is held against it.
        task = asyncio.create_task(world.read(1))
        for _ in range(5):
            await asyncio.sleep(0.001)
            for _ in range(17):
                world.step()
            world.die(is_outside=bool(is_outside))
        await _live(world, [task], [], {})
        assert task.result() == list(range(100))

    asyncio.run(test())


def test_only_those_an_engine_had_begun_with_are_suspects() -> None:
    async def test() -> None:
        world = _World([None] * 10, 40, 0)
        tasks = [asyncio.create_task(world.read(number)) for number in range(10)]
        await asyncio.sleep(0)
        for _ in range(2):
            world.step()
            world.die(is_outside=True)
        suspects = [stream.suspicion.num_deaths for stream in world.streams.unfinished()]
        assert suspects == [2] * _PLACES + [0] * (10 - _PLACES)
        await _live(world, tasks, [], {})

    asyncio.run(test())


def test_what_an_engine_says_late_of_one_that_is_set_aside_is_not_told_twice() -> None:
    """It takes in nothing for three steps, and gives tokens meanwhile."""

    async def test() -> None:
        world = _World([None, None], 60, 3)
        tasks = [asyncio.create_task(world.read(number)) for number in range(2)]
        await asyncio.sleep(0)
        for _ in range(2):
            for _ in range(4):
                world.step()
            world.die(is_outside=True)
        assert world.isolation.is_on
        # No suspect is left after the first, so it is given back at once.
        tasks.pop().cancel()
        await _live(world, tasks, [], {})
        assert tasks[0].result() == list(range(60))

    asyncio.run(test())


def test_many_kills_from_outside_are_spread_over_the_suspects() -> None:
    async def test() -> None:
        world = _World([None] * 4, 40, 0)
        tasks = [asyncio.create_task(world.read(number)) for number in range(4)]
        for _ in range(2 + 3 * 4):
            # Every other engine is killed before it has begun with anything.
            world.die(is_outside=True)
            await asyncio.sleep(0)
            world.step()
            world.die(is_outside=True)
        await _live(world, tasks, [], {})
        assert [task.result() for task in tasks] == [list(range(40))] * 4

    asyncio.run(test())
