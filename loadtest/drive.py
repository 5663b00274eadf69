"""Sends a workload's conversations at the right moments and keeps a record of each request.

Closed loop: so many conversations at a time, the next begins when one ends. Open loop: they begin
when they are due, however many run. Knows nothing of figures or files.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from loadtest.answer import Answer
from loadtest.prompts import Composer
from loadtest.records import Failure, Record
from loadtest.target import Outcome, Target
from loadtest.workloads import Lane

#: After a failure a closed loop waits, so that a dead server is not asked thousands of times.
_AFTER_FAILURE_S = 0.2
_LONGEST_WAIT_S = 10.0
#: Conversations of the warm-up differ from the measured ones.
WARM_UP_OFFSET = 1_000_000


@dataclass(slots=True)
class Live:
    """The present state of a run, for the progress line."""

    running: dict[int, Answer] = field(default_factory=dict)
    num_failed: int = 0
    #: Conversations of the first lane that have ended, however they did.
    num_conversations: int = 0
    #: Of requests that have ended.
    num_ended_tokens: float = 0.0

    @property
    def num_tokens(self) -> float:
        """Tokens so far; of answers that still run, pieces of text."""
        return self.num_ended_tokens + sum(one.num_pieces for one in self.running.values())


@dataclass(frozen=True, slots=True)
class Bounds:
    """When a run is over: after so many conversations, or so much time, whichever is first."""

    num_conversations: int
    duration_s: float = math.inf
    timeout_s: float = 600.0


@dataclass(slots=True)
class Driver:
    """One run against one server. `stop` ends it early, with the results so far."""

    target: Target
    composer: Composer
    bounds: Bounds
    live: Live = field(default_factory=Live)
    records: list[Record] = field(default_factory=list)
    #: How late a request was sent, at worst: the generator's own fault.
    worst_lateness_s: float = 0.0
    _began_s: float = 0.0
    _tasks: list[asyncio.Task[Any]] = field(default_factory=list)
    _is_stopped: bool = False

    async def warm_up(self, num_conversations: int) -> Failure | None:
        """Send conversations that are not measured, all at a time. Returns the failures."""
        warm = Driver(self.target, self.composer, self.bounds)
        lane = self.composer.workload.lanes[0]
        numbers = range(WARM_UP_OFFSET, WARM_UP_OFFSET + num_conversations)
        warm._began_s = self.target.clock_s()
        await asyncio.gather(*(warm._converse(lane, number, None) for number in numbers))
        return next((one.failure for one in warm.records if one.failure), None)

    async def run_closed(self) -> None:
        """Keep each lane's concurrency until the first lane has done its number."""
        self._began_s = self.target.clock_s()
        first, *others = self.composer.workload.lanes
        leaders = self._start_workers(first, self.bounds.num_conversations)
        for lane in others:
            self._start_workers(lane, None)
        await asyncio.wait(leaders)
        # Requests beside them are finished, but no new ones begin.
        self._is_stopped = True
        await self._all_done()

    async def run_open(self, due_s: Iterator[float]) -> None:
        """Begin conversations of the first lane when they are due."""
        self._began_s = self.target.clock_s()
        self._start(self._dispatch(self.composer.workload.lanes[0], due_s))
        await self._all_done()

    async def _dispatch(self, lane: Lane, due_s: Iterator[float]) -> None:
        for number, due in zip(range(self.bounds.num_conversations), due_s, strict=False):
            if due >= self.bounds.duration_s:
                return
            await asyncio.sleep(max(0.0, due - self._now_s()))
            self._start(self._converse(lane, number, due))

    def stop(self) -> None:
        """End now: running requests are recorded as cut off by us."""
        self._is_stopped = True
        for task in self._tasks:
            task.cancel()

    async def _all_done(self) -> None:
        while running := [task for task in self._tasks if not task.done()]:
            await asyncio.wait(running)
        for task in self._tasks:
            if not task.cancelled():
                task.result()  # A bug of ours is not to pass as an idle server.

    def _start_workers(self, lane: Lane, num_conversations: int | None) -> list[asyncio.Task[None]]:
        numbers = iter(count() if num_conversations is None else range(num_conversations))
        return [self._start(self._work(lane, numbers)) for _ in range(lane.concurrency)]

    def _start(self, work: Any) -> asyncio.Task[None]:  # noqa: ANN401 - any coroutine
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.append(task)
        return task

    async def _work(self, lane: Lane, numbers: Iterator[int]) -> None:
        for number in numbers:
            if self._is_stopped or self._now_s() >= self.bounds.duration_s:
                return
            pause_s = await self._converse(lane, number, None) or lane.think_s
            if pause_s:
                await asyncio.sleep(pause_s)

    async def _converse(self, lane: Lane, number: int, due_s: float | None) -> float:
        """Send all turns of a conversation; return the pause before the next conversation."""
        history: list[dict[str, Any]] = []
        pause_s = 0.0
        for index, turn in enumerate(lane.make(number)):
            await asyncio.sleep(turn.think_s)
            body, answer, sent_s = self.composer.body(turn, history), Answer(), self._now_s()
            # A timer may be a little early: then it was due when it was sent.
            at_s = sent_s if due_s is None or index else min(due_s, sent_s)
            place = Record(lane.name, number, index, at_s, sent_s, sent_s, turn.max_tokens)
            outcome = await self._ask(place, body, answer)
            if outcome.failure is not None:
                pause_s = min(outcome.retry_after_s or _AFTER_FAILURE_S, _LONGEST_WAIT_S)
                break
            if self.composer.workload.endpoint == "chat":
                history = [*self.composer.messages(turn, history), answer.message()]
        self.live.num_conversations += lane is self.composer.workload.lanes[0]
        return pause_s

    async def _ask(self, place: Record, body: dict[str, Any], answer: Answer) -> Outcome:
        self.worst_lateness_s = max(self.worst_lateness_s, place.sent_s - place.due_s)
        self.live.running[id(answer)] = answer
        outcome = Outcome(Failure("interrupted", "cut off by us", is_ours=True))
        try:
            outcome = await self.target.stream(
                self.composer.path, body, self.bounds.timeout_s, answer
            )
        finally:
            del self.live.running[id(answer)]
            self._keep(replace(place, ended_s=self._now_s()), outcome, answer)
        return outcome

    def _keep(self, place: Record, outcome: Outcome, answer: Answer) -> None:
        moments, tokens = answer.arrivals()
        is_json = answer.is_json() if self.composer.workload.asks_for_json else None
        record = replace(
            place,
            arrival_s=tuple(moment_s - self._began_s for moment_s in moments),
            arrival_tokens=tokens,
            prompt_tokens=answer.prompt_tokens,
            output_tokens=answer.output_tokens,
            cached_tokens=answer.cached_tokens,
            finish_reason=answer.finish_reason,
            is_json=None if outcome.failure else is_json,
            failure=outcome.failure,
        )
        self.records.append(record)
        self.live.num_failed += outcome.failure is not None
        self.live.num_ended_tokens += record.num_output_tokens

    def _now_s(self) -> float:
        return self.target.clock_s() - self._began_s
