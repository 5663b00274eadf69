"""When a refused client is told to come again."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from scheduler.client import (
    Delta,
    EngineStats,
    EngineUnavailableError,
    GenerateRequest,
    RejectKind,
    RequestRefusedError,
)
from server.pace import LEAST_S, MOST_S, QueuePace


class Engine:
    """The two things a pace reads of an engine, and its clock."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.snapshot = EngineStats()
        self.observers: list[Callable[[int], None]] = []
        engine: Any = self
        self.pace = QueuePace(engine, lambda: self.now_s)

    def stats(self) -> EngineStats:
        return self.snapshot

    def on_step(self, observer: Callable[[int], None]) -> None:
        self.observers.append(observer)

    def step(self, after_s: float, *, admitted: int, waiting_tokens: int = 0) -> None:
        self.now_s += after_s
        self.snapshot = EngineStats(
            num_waiting=waiting_tokens > 0,
            num_waiting_tokens=waiting_tokens,
            prefix_queries_tokens_total=admitted,
        )
        for observer in self.observers:
            observer(1)


@pytest.fixture
def engine() -> Engine:
    return Engine()


def test_nothing_measured_is_the_shortest_wait(engine: Engine) -> None:
    assert engine.pace.retry_after_s() == LEAST_S


def test_it_is_what_waits_over_the_pace_of_the_queue(engine: Engine) -> None:
    for second in range(60):
        engine.step(1.0, admitted=100 * second, waiting_tokens=700)
    assert engine.pace.retry_after_s() == 7
    engine.snapshot = EngineStats(num_waiting=1, num_waiting_tokens=1500)
    assert engine.pace.retry_after_s() == 15
    engine.snapshot = EngineStats(num_waiting=1, num_waiting_tokens=10**9)
    assert engine.pace.retry_after_s() == MOST_S


def test_time_without_a_queue_says_nothing_of_its_pace(engine: Engine) -> None:
    for second in range(10):
        engine.step(1.0, admitted=100 * second, waiting_tokens=500)
    engine.step(1.0, admitted=1000)
    engine.step(3600.0, admitted=1000)
    engine.step(1.0, admitted=1000, waiting_tokens=500)
    assert engine.pace.retry_after_s() == 5


def test_the_newest_counts_most(engine: Engine) -> None:
    admitted = 0
    for _ in range(30):
        admitted += 1000
        engine.step(1.0, admitted=admitted, waiting_tokens=1000)
    for _ in range(120):
        admitted += 50
        engine.step(1.0, admitted=admitted, waiting_tokens=1000)
    assert engine.pace.retry_after_s() == pytest.approx(20, abs=1)


def test_a_queue_that_stands_still_is_waited_for_longer_and_longer(engine: Engine) -> None:
    engine.step(1.0, admitted=0, waiting_tokens=10)
    engine.now_s += 4.0
    assert engine.pace.retry_after_s() == 4
    engine.now_s += 400.0
    assert engine.pace.retry_after_s() == MOST_S


def test_a_new_engine_that_counts_from_0_takes_nothing_back(engine: Engine) -> None:
    for second in range(10):
        engine.step(1.0, admitted=100 * second, waiting_tokens=500)
    engine.step(1.0, admitted=0, waiting_tokens=500)
    assert engine.pace.retry_after_s() in {5, 6}


def test_a_429_tells_it(scripted: Callable[..., Any]) -> None:
    async def script(client: Any, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        if request.prompt_token_ids == (120,):
            raise RequestRefusedError("full", RejectKind.BUSY, None)
        for admitted in (0, 1):
            client.engine_stats = EngineStats(
                num_waiting=1,
                num_waiting_tokens=10**9,
                prefix_queries_tokens_total=admitted,
            )
            for observe in client.observers:
                observe(1)
        yield Delta(finish_reason=None)

    live = scripted(script)
    live.post("/v1/completions", prompt="y")
    answer = live.post("/v1/completions", prompt="x")
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == str(MOST_S)


@pytest.mark.parametrize(("retry_after_s", "told"), [(None, "5"), (0.0, "1"), (12.3, "13")])
def test_a_503_tells_when_the_engine_should_be_there(
    scripted: Callable[..., Any], retry_after_s: float | None, told: str
) -> None:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        if request.prompt_token_ids:
            raise EngineUnavailableError("the engine is being restarted", retry_after_s)
        yield Delta()

    live = scripted(script)
    answer = live.chat()
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == told
    assert live.metric('octavo_requests_rejected_total{reason="unavailable"}') == 1
