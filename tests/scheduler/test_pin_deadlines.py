"""Pins of requests against a clock: set when the prompt is computed, renewed, expired, refused."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from cache.pins import LIFETIMES_S, PinEnd, PrefixPin
from configs.schema import SchedulerSection
from model.fake import FakeRunner
from model.interface import Constraint, SamplingParams
from scheduler.engine import Engine
from scheduler.messages import (
    Cancel,
    GenerateRequest,
    Pinned,
    PinPrefix,
    ResetCache,
    StepResult,
    Submit,
    UnpinPrefix,
)

PAGE_SIZE = 4


class Drive:
    """An engine in the same process, whose clock is set by hand."""

    def __init__(self, num_pages: int = 32, *, share: float = 0.5) -> None:
        self.now_s = 0.0
        runner = FakeRunner(num_pages=num_pages, page_size=PAGE_SIZE, max_model_len=256)
        config = SchedulerSection(
            max_num_seqs=4, max_num_batched_tokens=16, cache_pin_share=share, debug=True
        )
        self.engine = Engine(runner, config, lambda: self.now_s, lambda _: None)
        self.num_requests = 0

    def submit(self, *token_ids: int, pins: tuple[PrefixPin, ...] = (), **fields: object) -> int:
        """Submit a request for a few tokens."""
        max_tokens = fields.pop("max_tokens", 2)
        assert isinstance(max_tokens, int)
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        request = GenerateRequest(token_ids, params, pins=pins, **fields)  # type: ignore[arg-type] # by name
        self.num_requests += 1
        self.engine.handle(Submit(self.num_requests, request))
        return self.num_requests

    def steps(self) -> list[StepResult]:
        """Run until nothing is left to do."""
        results = []
        while self.engine.has_work:
            results.append(self.engine.step())
            self.engine.check()
        return results

    def serve(self, *token_ids: int, pins: tuple[PrefixPin, ...] = (), **fields: object) -> Pinned:
        """Run a request, and return the effect of its pins."""
        self.submit(*token_ids, pins=pins, **fields)
        [pinned] = [one for result in self.steps() for one in result.pinned]
        return pinned

    def read(self, *token_ids: int) -> int:
        """Run a request without pins, and return how many of its tokens were cached."""
        self.submit(*token_ids)
        [started] = [one for result in self.steps() for one in result.started]
        return started.cached_tokens

    def pass_time(self, seconds: float) -> None:
        """Let time pass, until the engine does something again."""
        self.now_s += seconds
        self.engine.step()
        self.engine.check()

    @property
    def pages(self) -> dict[str, int]:
        """Pinned pages by lifetime, without the lifetimes that have none."""
        counts = zip(LIFETIMES_S, self.engine.stats().cache.pins.pages, strict=True)
        return {name: count for name, count in counts if count}

    @property
    def ended(self) -> dict[str, int]:
        counts = zip(PinEnd, self.engine.stats().cache.pins.ended_total, strict=True)
        return {str(why): count for why, count in counts if count}


def pin(num_tokens: int, lifetime: str = "5m") -> tuple[PrefixPin, ...]:
    return (PrefixPin(num_tokens, lifetime),)


PROMPT = tuple(range(1, 13))


def test_a_prompt_is_pinned_once_it_is_computed() -> None:
    drive = Drive()
    drive.submit(*range(1, 41), pins=pin(40))
    first = drive.engine.step()
    assert not first.pinned
    assert drive.pages == {}
    [pinned] = [one for result in drive.steps() for one in result.pinned]
    assert pinned == Pinned(1, num_refused=0, num_displaced=0)
    assert drive.pages == {"5m": 10}


@pytest.mark.parametrize("lifetime", LIFETIMES_S)
def test_a_pin_ends_after_its_lifetime_and_its_pages_stay(lifetime: str) -> None:
    drive = Drive()
    drive.serve(*PROMPT, pins=pin(12, lifetime))
    drive.pass_time(LIFETIMES_S[lifetime] - 1)
    assert drive.pages == {lifetime: 3}
    drive.pass_time(1)
    assert drive.pages == {}
    assert drive.ended == {"expired": 1}
    assert drive.read(*PROMPT, 50) == 12, "an expired pin frees nothing"


def test_a_use_renews_and_another_prompt_does_not() -> None:
    drive = Drive()
    drive.serve(*PROMPT, pins=pin(12))
    drive.pass_time(200)
    assert drive.read(*PROMPT, 50) == 12
    drive.pass_time(200)
    drive.read(*range(100, 110))
    assert drive.pages == {"5m": 3}
    drive.pass_time(99)
    assert drive.pages == {"5m": 3}
    drive.pass_time(1)
    assert drive.pages == {}


def test_the_same_request_again_renews_its_pins() -> None:
    drive = Drive()
    drive.serve(*PROMPT, pins=pin(12))
    drive.now_s = 299
    drive.serve(*PROMPT, pins=pin(12))
    drive.pass_time(299)
    assert drive.pages == {"5m": 3}
    assert drive.ended == {}


def test_each_breakpoint_has_its_own_lifetime() -> None:
    drive = Drive()
    drive.serve(*PROMPT, pins=(PrefixPin(4, "1h"), PrefixPin(12, "5m")))
    assert drive.pages == {"1h": 1, "5m": 2}
    drive.pass_time(300)
    assert drive.pages == {"1h": 1}


def test_under_pressure_what_expired_goes_first() -> None:
    drive = Drive(num_pages=10, share=1.0)
    drive.serve(*PROMPT, pins=pin(12, "5m"))
    drive.now_s = 100
    drive.serve(*range(20, 32), pins=pin(12, "5m"))
    drive.now_s = 300
    drive.serve(*range(40, 60), pins=pin(20, "5m"))
    assert drive.engine.cache.match([*PROMPT, 99]).num_tokens < 12
    assert drive.engine.cache.match([*range(20, 32), 99]).num_tokens == 12


def test_too_many_pins_end_the_oldest_and_the_answer_reports_it() -> None:
    drive = Drive(num_pages=16, share=0.25)
    assert drive.serve(*PROMPT, pins=pin(12)) == Pinned(1, 0, 0)
    assert drive.serve(*range(20, 32), pins=pin(12)) == Pinned(2, 0, 1)
    assert drive.serve(*range(40, 60), pins=pin(20)) == Pinned(3, 1, 0)
    assert drive.pages == {"5m": 3}
    assert drive.ended == {"quota": 1}


def test_a_prompt_of_a_prewarming_is_pinned() -> None:
    drive = Drive()
    assert drive.serve(*PROMPT, pins=pin(12), max_tokens=0) == Pinned(1, 0, 0)
    assert drive.pages == {"5m": 3}
    assert drive.read(*PROMPT, 50) == 12


def test_a_breakpoint_before_the_first_whole_page_is_not_refused() -> None:
    drive = Drive()
    assert drive.serve(1, 2, pins=pin(2), max_tokens=0) == Pinned(1, 0, 0)
    assert drive.pages == {}


def test_a_request_that_ends_before_its_prompt_is_computed_pins_nothing() -> None:
    drive = Drive()
    drive.submit(*range(1, 41), pins=pin(40))
    drive.engine.step()
    drive.engine.handle(Cancel(1))
    drive.submit(*range(300), pins=pin(12))
    assert [one for result in drive.steps() for one in result.pinned] == []
    assert drive.pages == {}
    assert not drive.engine._pins._waiting


def test_requests_without_pins_run_beside_those_with() -> None:
    drive = Drive()
    drive.submit(*range(1, 5), max_tokens=9)
    drive.engine.step()
    drive.submit(*range(20, 60), pins=pin(40))
    assert [one for result in drive.steps() for one in result.pinned] == [Pinned(2, 0, 0)]
    assert drive.pages == {"5m": 10}


def test_a_failed_request_pins_nothing() -> None:
    drive = Drive()
    drive.submit(*PROMPT, pins=pin(12))
    drive.engine._pins.land(StepResult(failed=[(1, "a bug")]), 0.0)
    assert not drive.engine._pins._waiting


def test_a_request_whose_grammar_fails_pins_nothing() -> None:
    class Broken(FakeRunner):
        def prepare(self, grammar: str) -> Future[Constraint]:
            raise RuntimeError(grammar)

    engine = Engine(Broken(), SchedulerSection(), lambda: 0.0, lambda _: None)
    params = SamplingParams(max_tokens=2, grammar="a")
    engine.handle(Submit(1, GenerateRequest(PROMPT, params, pins=pin(12))))
    assert engine.step().failed
    assert not engine._pins._waiting


def test_a_preempted_request_is_pinned_once() -> None:
    drive = Drive(num_pages=8, share=1.0)
    drive.submit(*range(1, 13), pins=pin(12), max_tokens=12)
    drive.submit(*range(20, 28), max_tokens=12)
    results = drive.steps()
    assert sum(len(result.pinned) for result in results) == 1
    assert sum(len(result.started) for result in results) == 2


def test_a_request_that_is_not_to_be_stored_leaves_nothing() -> None:
    drive = Drive()
    drive.submit(*range(1, 41), store_up_to=0, max_tokens=20)
    drive.steps()
    stats = drive.engine.stats().cache
    assert stats.pages_free == stats.pages_total


def test_a_request_is_stored_up_to_its_last_breakpoint() -> None:
    drive = Drive()
    drive.serve(*PROMPT, pins=pin(9), store_up_to=9, max_tokens=20)
    assert drive.engine.stats().cache.pages_cached == 2
    assert drive.pages == {"5m": 2}


def test_an_operator_pins_and_unpins_a_prefix() -> None:
    drive = Drive()
    drive.read(*PROMPT)

    def answer(command: PinPrefix | UnpinPrefix | ResetCache) -> int:
        drive.engine.handle(command)
        [number] = drive.engine.step().cache_answers
        assert isinstance(number, int)
        drive.engine.check()
        assert isinstance(number, int)
        return number

    pinned = PinPrefix(PROMPT, "", "operator", "1h")
    assert answer(pinned) == 3
    assert drive.pages == {"1h": 3}
    assert answer(PinPrefix((7, 7, 7, 7), "", "operator", "1h")) == 0
    assert answer(UnpinPrefix(PROMPT[:8], "")) == 0, "it ends later"
    assert answer(UnpinPrefix(PROMPT, "")) == 1
    assert drive.ended == {"removed": 1}
    assert answer(pinned) == 3
    assert answer(ResetCache()) == 3
    assert drive.pages == {}


def test_entries_of_ended_pins_are_dropped() -> None:
    drive = Drive(num_pages=8)
    for first in range(200):
        drive.serve(*[first % 60, first // 60, 1, 1, 1], pins=pin(4, "24h"))
    assert len(drive.engine._pins._heap) <= 70


def test_a_used_pin_that_has_ended_stays_ended() -> None:
    drive = Drive()
    drive.serve(*PROMPT, pins=pin(12))
    drive.submit(*PROMPT, 50)
    drive.engine.step()
    [held] = drive.engine.cache.pins
    drive.engine.cache.pins.end(held, PinEnd.REMOVED)
    drive.steps()
    drive.pass_time(1_000)
    assert drive.ended == {"removed": 1}
