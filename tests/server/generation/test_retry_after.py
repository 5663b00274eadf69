"""The time after which a refused client may come again."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any

import pytest

from configs.schema import SchedulerSection
from scheduler.client import (
    EngineStats,
    EngineUnavailableError,
    FinishReason,
    GenerateRequest,
    RejectKind,
    RequestRefusedError,
    SchedulerStats,
    TokenOutput,
)
from server.generation.retry_after import MAX_S, QueueReservations


class Engine:
    """The part of an engine that the reservations read, and its clock."""

    def __init__(self, **config: Any) -> None:
        self.now_s = 100.0
        self.snapshot = EngineStats()
        self.observers: list[Callable[[int], None]] = []
        engine: Any = self
        section = SchedulerSection(**{"max_num_seqs": 2, "max_queue": 4} | config)
        self.reservations = QueueReservations(engine, lambda: self.now_s, section)

    def stats(self) -> EngineStats:
        return self.snapshot

    def on_step(self, observer: Callable[[int], None]) -> None:
        self.observers.append(observer)

    def step(self, after_s: float, *, started: int = 0, waiting: int = 4, running: int = 2) -> None:
        for _ in range(started):
            self.reservations.note_started()
        self.now_s += after_s
        self.snapshot = EngineStats(SchedulerStats(num_waiting=waiting, num_running=running))
        for observer in self.observers:
            observer(1)


@pytest.fixture
def engine() -> Engine:
    return Engine()


def test_the_first_wait_is_short_and_each_is_longer_than_the_one_before(engine: Engine) -> None:
    told = [engine.reservations.retry_after_s(whose) for whose in range(100)]
    assert told[0] <= 2
    assert told == sorted(told)
    assert told[-1] == MAX_S
    assert len(set(told)) > 40, "they come back spread"


@pytest.mark.parametrize("started", [1, 5])
def test_reserved_are_as_far_apart_as_places_come_in(engine: Engine, started: int) -> None:
    for tenth in range(600):
        engine.step(0.1, started=started if tenth % 10 == 0 else 0)
    told = [engine.reservations.retry_after_s(whose) for whose in range(30)]
    assert told[-1] == pytest.approx(30 / started * 1.25, abs=2)


def test_time_without_a_queue_says_nothing_of_its_pace(engine: Engine) -> None:
    for _ in range(60):
        engine.step(1.0, started=1)
    engine.step(1.0, waiting=0, running=1)
    engine.step(3600.0, waiting=0, running=1)
    engine.step(1.0)
    assert engine.reservations.retry_after_s(1) == 2


def test_the_newest_counts_most(engine: Engine) -> None:
    for _ in range(30):
        engine.step(1.0, started=10)
    for second in range(2000):
        engine.step(1.0, started=second % 10 == 0)
    assert engine.reservations.retry_after_s(1) == pytest.approx(13, abs=3)


def test_a_queue_that_stands_still_is_waited_for_longer_and_longer(engine: Engine) -> None:
    engine.step(1.0)
    engine.now_s += 4.0
    assert engine.reservations.retry_after_s(1) == 5
    engine.now_s += 400.0
    assert engine.reservations.retry_after_s(2) == MAX_S


def test_who_was_promised_a_place_has_it_when_it_comes(engine: Engine) -> None:
    for _ in range(30):
        engine.step(1.0, started=1)
    assert not engine.reservations.has_place(7)
    told_s = engine.reservations.retry_after_s(7)
    engine.step(0.1, waiting=3)
    assert not engine.reservations.has_place(8), "a newcomer gets what was promised to another"
    assert not engine.reservations.has_place(7), "it is too early"
    engine.now_s += told_s
    assert engine.reservations.has_place(7)
    assert not engine.reservations.has_place(7), "a promise is kept once"


def test_a_place_that_nobody_comes_for_is_free_again(engine: Engine) -> None:
    for _ in range(30):
        engine.step(1.0, started=1)
    told_s = engine.reservations.retry_after_s(7)
    engine.step(told_s + 3.0, waiting=3)
    assert engine.reservations.has_place(8)
    assert not engine.reservations.has_place(9), "the engine's count is of before"


def test_reserved_take_half_of_the_queue_at_most(engine: Engine) -> None:
    for _ in range(30):
        engine.step(1.0, started=1)
    for whose in range(40):
        engine.reservations.retry_after_s(whose)
    engine.step(0.1, waiting=1)
    assert [engine.reservations.has_place(99) for _ in range(2)] == [True, False]


def test_a_burst_that_can_start_at_once_has_a_place() -> None:
    engine = Engine(max_num_seqs=8, max_queue=0)
    engine.step(1.0, waiting=0, running=2)
    assert [engine.reservations.has_place(1) for _ in range(7)] == [True] * 6 + [False]


class Flood:
    """Clients that send a request, repeat it after Retry-After, and send the next after the answer.

    The engine is a queue before a number of places, in which an answer takes its time.
    """

    def __init__(
        self,
        *,
        places: int,
        queue: int,
        clients: int,
        answer_s: tuple[float, float],
        passers_per_s: float = 0.0,
        are_alike: bool = False,
    ) -> None:
        """`passers_per_s`: others, who ask once. `are_alike`: all send the same bytes."""
        self.engine = Engine(max_num_seqs=places, max_queue=queue)
        self.places, self.queue_limit, self.answer_s = places, queue, answer_s
        self.are_alike = are_alike
        self.chance = random.Random(7)
        self.queue: list[bool] = []
        self.num_running = self.num_served = self.num_back = self.num_kept = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        for _ in range(clients):
            self._after(self.chance.random(), self._new_client)
        if passers_per_s:
            self._after(0.0, partial(self._passer, passers_per_s))
        self._after(0.0, self._step)

    def run(self, duration_s: float) -> None:
        end_s = self.engine.now_s + duration_s
        while self._events[0][0] < end_s:
            self.engine.now_s, _, happen = heapq.heappop(self._events)
            happen()

    def _after(self, delay_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.engine.now_s + delay_s, next(self._order), happen))

    def _new_client(self) -> None:
        self._ask(0 if self.are_alike else self.chance.getrandbits(40))

    def _passer(self, per_s: float) -> None:
        self._ask(self.chance.getrandbits(40), is_passer=True)
        self._after(self.chance.expovariate(per_s), partial(self._passer, per_s))

    def _ask(self, whose: int, *, was_promised: bool = False, is_passer: bool = False) -> None:
        places = self.engine.reservations
        has_room = self.num_running + len(self.queue) < self.places
        is_taken = places.has_place(whose) and (has_room or len(self.queue) < self.queue_limit)
        self.num_back += was_promised
        self.num_kept += was_promised and is_taken
        if is_taken:
            self.queue.append(is_passer)
            return
        num_promised = len(places._reserved)
        told_s = places.retry_after_s(whose)
        if not is_passer:
            again = partial(self._ask, whose, was_promised=len(places._reserved) > num_promised)
            self._after(told_s + self.chance.uniform(0.005, 0.05), again)

    def _step(self) -> None:
        num_started = 0
        while self.queue and self.num_running < self.places:
            self.num_running += 1
            num_started += 1
            self._after(
                self.chance.uniform(*self.answer_s), partial(self._answer, self.queue.pop(0))
            )
        self.engine.step(
            0.0, started=num_started, waiting=len(self.queue), running=self.num_running
        )
        self._after(0.05, self._step)

    def _answer(self, is_passer: bool) -> None:
        self.num_running -= 1
        self.num_served += 1
        if not is_passer:
            self._after(0.01, self._new_client)


@pytest.mark.parametrize("are_alike", [False, True], ids=["each its own", "all the same"])
@pytest.mark.parametrize(
    "flood",
    [
        {"places": 8, "queue": 16, "clients": 100, "answer_s": (4.0, 4.0)},
        {"places": 8, "queue": 16, "clients": 100, "answer_s": (0.5, 9.0)},
        {"places": 64, "queue": 64, "clients": 400, "answer_s": (5.0, 20.0)},
        {"places": 4, "queue": 4, "clients": 40, "answer_s": (1.0, 3.0)},
        {"places": 4, "queue": 8, "clients": 400, "answer_s": (2.0, 6.0)},
    ],
    ids=["in step", "uneven", "large", "small queue", "beyond a minute"],
)
def test_of_those_who_come_when_they_are_told_most_are_taken_in(
    flood: dict[str, Any], are_alike: bool
) -> None:
    clients = Flood(**flood, are_alike=are_alike)
    clients.run(600.0)
    assert clients.num_back > 100
    assert clients.num_kept / clients.num_back >= 0.8
    mean_s = sum(flood["answer_s"]) / 2
    assert clients.num_served >= 0.9 * 600.0 * flood["places"] / mean_s, "places stand empty"


def test_those_who_never_come_back_leave_no_places_empty_and_take_none_of_others() -> None:
    clients = Flood(places=8, queue=16, clients=60, answer_s=(2.0, 6.0), passers_per_s=20.0)
    clients.run(600.0)
    assert clients.num_back > 20
    assert clients.num_kept / clients.num_back >= 0.8
    assert clients.num_served >= 0.9 * 600.0 * 8 / 4.0


def test_a_full_queue_refuses_before_it_reads_what_is_asked(
    scripted: Callable[..., Any],
) -> None:
    live = scripted(_said)
    client: Any = live.client
    client.engine_stats = EngineStats(SchedulerStats(num_waiting=1024, num_running=64))
    answers = [
        live.http.post(path, content=b"{nonsense")
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")
    ]
    assert [answer.status_code for answer in answers] == [429] * 4
    told = [int(answer.headers["retry-after"]) for answer in answers]
    assert told == sorted(told)
    assert len(set(told)) > 1
    assert live.metric('octavo_requests_rejected_total{reason="queue_full"}') == 4
    assert live.post("/v1/completions", prompt="x", priority=-1).status_code == 200
    assert live.post("/tokenize", prompt="x").status_code == 200
    client.engine_stats = EngineStats(
        SchedulerStats(num_waiting=1024, num_running=64, lowest_waiting_priority=1)
    )
    assert live.post("/v1/completions", prompt="x").status_code == 200


async def _said(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
    yield TokenOutput(request.prompt_token_ids, finish_reason=FinishReason.STOP)


def test_a_refusal_of_the_engine_is_a_promise_too(scripted: Callable[..., Any]) -> None:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        if request.prompt_token_ids:
            raise RequestRefusedError("full", RejectKind.BUSY, None)
        yield TokenOutput()

    live = scripted(script)
    answers = [live.post("/v1/completions", prompt="x") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [429] * 5
    assert [int(answer.headers["retry-after"]) for answer in answers] == [2, 3, 4, 5, 7]


@pytest.mark.parametrize(("retry_after_s", "told"), [(None, "5"), (0.0, "1"), (12.3, "13")])
def test_a_503_tells_when_the_engine_should_be_there(
    scripted: Callable[..., Any], retry_after_s: float | None, told: str
) -> None:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        if request.prompt_token_ids:
            raise EngineUnavailableError("the engine is being restarted", retry_after_s)
        yield TokenOutput()

    live = scripted(script)
    answer = live.chat()
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == told
    assert live.metric('octavo_requests_rejected_total{reason="unavailable"}') == 1
