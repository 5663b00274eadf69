"""Steps that are planned and launched before the tokens of the one before are known."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from cache.kv_cache import KVCache
from configs.schema import SchedulerSection
from model.fake import FAKE_EOS_TOKEN_ID, FakeRunner, fake_logprobs, fake_next_token
from model.interface import (
    PENDING_TOKEN,
    SamplingParams,
    SlotStart,
    StepInput,
    StepOutput,
    Vocabulary,
)
from scheduler.engine import Engine
from scheduler.messages import (
    Cancel,
    FinishReason,
    GenerateRequest,
    SetVocabulary,
    StepResult,
    Submit,
)
from scheduler.scheduler import Scheduler
from waiting import TIMEOUT_S

#: Token 0 ends the text, the others are the letters from "A" on.
VOCABULARY = Vocabulary(
    bytes(range(64, 128)), array("I", range(1, 65)), (FAKE_EOS_TOKEN_ID,), (FAKE_EOS_TOKEN_ID,)
)
LETTERS = '%llguidance {"no_forcing": true}\nstart: "ABCabc"'


class Recorder(FakeRunner):
    """Keeps the steps that it computed."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**{"max_steps_in_flight": 2, "num_pages": 16} | fields)
        self.steps: list[StepInput] = []

    def launch(self, step: StepInput) -> Any:
        self.steps.append(step)
        return FakeRunner.launch(self, step)

    @property
    def num_flights(self) -> int:
        return len(self._in_flight)


class Told:
    """An engine with a clock that ticks at each reading, and all its outputs."""

    def __init__(self, runner: FakeRunner, **config: Any) -> None:
        section = SchedulerSection(
            **{"max_num_seqs": 8, "max_num_batched_tokens": 32, "debug": True} | config
        )
        ticks: Iterator[int] = count()
        self.engine = Engine(runner, section, lambda: float(next(ticks)), lambda _: None)
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, FinishReason] = {}

    def submit(self, request_id: int, prompt: tuple[int, ...], **params: Any) -> None:
        sampling = SamplingParams(**{"max_tokens": 6, "ignore_eos": True} | params)
        self.engine.handle(Submit(request_id, GenerateRequest(prompt, sampling)))
        self.tokens[request_id] = []

    def step(self) -> StepResult:
        result = self.engine.step()
        self.engine.check()
        for request_id, token_id in zip(result.request_ids, result.token_ids, strict=True):
            self.tokens[request_id].append(token_id)
        self.finished |= dict(result.finished)
        return result

    def run(self) -> None:
        for _ in range(500):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("it does not end")


def expected(prompt: tuple[int, ...], num_tokens: int, *, may_end: bool = False) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + num_tokens and not (may_end and tokens[-1] == 0):
        tokens.append(fake_next_token(tokens, 64, may_end=may_end))
    return tokens[len(prompt) :]


def test_a_step_is_launched_before_the_one_before_it_is_over() -> None:
    runner = Recorder()
    told = Told(runner)
    told.submit(0, (1, 2, 3), max_tokens=4)
    told.step()
    assert [step.token_ids for step in runner.steps] == [[1, 2, 3], [PENDING_TOKEN]]
    assert told.tokens[0] == expected((1, 2, 3), 1)
    told.run()
    assert told.tokens[0] == expected((1, 2, 3), 4)
    # That it is at its end by length is known beforehand: nothing was computed in vain.
    assert [step.rows[0].position for step in runner.steps] == [0, 3, 4, 5]


def test_a_token_behind_the_end_is_dropped() -> None:
    prompt = next((n,) for n in range(1, 64) if 3 <= len(expected((n,), 20, may_end=True)) < 15)
    wanted = expected(prompt, 20, may_end=True)
    runner = Recorder()
    told = Told(runner)
    told.submit(0, prompt, max_tokens=20, ignore_eos=False)
    told.run()
    assert told.tokens[0] == wanted
    assert told.finished == {0: FinishReason.STOP}
    assert len(runner.steps) == len(wanted) + 1


@pytest.mark.parametrize("max_steps_in_flight", [2, 3])
def test_preempted_with_steps_under_way(max_steps_in_flight: int) -> None:
    """Three sequences outgrow the pool; each still gets the tokens it would get alone."""
    runner = Recorder(num_pages=7, page_size=2, max_steps_in_flight=max_steps_in_flight)
    told = Told(runner)
    prompts = {0: (1, 2, 3), 1: (4, 5, 6), 2: (7, 8, 9)}
    for request_id, prompt in prompts.items():
        told.submit(request_id, prompt, max_tokens=8)
    told.run()
    assert told.engine.stats().scheduler.preemptions_total > 0
    assert told.tokens == {id_: expected(prompt, 8) for id_, prompt in prompts.items()}


def test_a_step_of_an_earlier_stay_does_not_count_for_the_next() -> None:
    runner = Recorder()
    config = SchedulerSection(max_num_seqs=2, max_num_batched_tokens=4)
    scheduler = Scheduler(KVCache(16, 4), config, runner.info)
    scheduler.submit(Submit(0, GenerateRequest(tuple(range(1, 11)), SamplingParams(max_tokens=2))))
    first = scheduler.plan()
    assert first is not None
    in_flight_step = runner.launch(first.step)
    sequence = first.sequences[0]
    scheduler._table.preempt(sequence)
    second = scheduler.plan()
    assert second is not None
    assert second.sequences == [sequence]
    scheduler.apply(first, in_flight_step.wait())
    assert (sequence.num_completed, sequence.num_computed) == (0, 4)
    scheduler.apply(second, runner.launch(second.step).wait())
    assert (sequence.num_completed, sequence.num_computed) == (4, 4)
    scheduler.check()


def test_a_sequence_does_not_come_back_before_its_newest_token_is_known() -> None:
    runner = Recorder()
    config = SchedulerSection(max_num_seqs=2, max_num_batched_tokens=4)
    scheduler = Scheduler(KVCache(16, 4), config, runner.info)
    scheduler.submit(
        Submit(0, GenerateRequest((1, 2, 3), SamplingParams(max_tokens=3, ignore_eos=True)))
    )
    first = scheduler.plan()
    assert first is not None
    in_flight_step = runner.launch(first.step)
    scheduler._table.preempt(first.sequences[0])
    assert scheduler.plan() is None
    scheduler.check()
    assert scheduler.apply(first, in_flight_step.wait()).token_ids == expected((1, 2, 3), 1)
    second = scheduler.plan()
    assert second is not None
    assert second.step.token_ids == [1, 2, 3, *expected((1, 2, 3), 1)]


def test_a_prompt_is_told_of_once_though_it_was_preempted_with_its_step_under_way() -> None:
    runner = Recorder()
    config = SchedulerSection(max_num_seqs=2, max_num_batched_tokens=4)
    scheduler = Scheduler(KVCache(16, 4), config, runner.info)
    prompt = tuple(range(1, 9))
    params = SamplingParams(max_tokens=1, ignore_eos=True, prompt_logprobs=2)
    scheduler.submit(Submit(0, GenerateRequest(prompt, params)))
    first = scheduler.plan()
    assert first is not None
    in_flight_step = runner.launch(first.step)
    scheduler._table.preempt(first.sequences[0])
    second = scheduler.plan()
    assert second is not None
    assert second.step.scored == first.step.scored
    told = scheduler.apply(first, in_flight_step.wait()).prompt_logprobs
    assert [(id_, len(scores)) for id_, scores in told] == [(0, 4)]
    assert scheduler.apply(second, runner.launch(second.step).wait()).prompt_logprobs == []
    third = scheduler.plan()
    assert third is not None
    told += scheduler.apply(third, runner.launch(third.step).wait()).prompt_logprobs
    scores = [one for _, some in told for one in some]
    assert scores == [fake_logprobs(prompt[:i], prompt[i], 2) for i in range(1, 8)]


def _with_grammar(runner: Recorder) -> Scheduler:
    """Return a scheduler with one sequence that follows a grammar, and one that does not."""
    config = SchedulerSection(max_num_seqs=2, max_num_batched_tokens=8)
    scheduler = Scheduler(KVCache(16, 4), config, runner.info)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    scheduler.submit(Submit(0, GenerateRequest((1, 2, 3), params)), constraint="a grammar")
    scheduler.submit(Submit(1, GenerateRequest((4, 5), params)))
    return scheduler


class Unasked(Recorder):
    """Asks no grammar."""

    def _start(self, start: SlotStart) -> None:
        FakeRunner._start(self, replace(start, constraint=None))


@pytest.mark.parametrize("is_preempted", [False, True])
def test_a_token_that_does_not_come_is_taken_back_while_others_go_on(*, is_preempted: bool) -> None:
    runner = Unasked()
    scheduler = _with_grammar(runner)
    first = scheduler.plan()
    assert first is not None
    in_flight_step = runner.launch(first.step)
    second = scheduler.plan()
    assert second is not None
    assert [sequence.request_id for sequence in second.sequences] == [1], "it counts on no token"
    next_flight = runner.launch(second.step)
    guided = first.sequences[0]
    if is_preempted:
        scheduler._table.preempt(guided)
    output = in_flight_step.wait()
    outcome = scheduler.apply(first, replace(output, token_ids=[[], output.token_ids[1]]))
    scheduler.check()
    assert outcome.request_ids == [1]
    assert (guided.token_ids, guided.num_computed) == ([1, 2, 3], 0 if is_preempted else 2)
    tokens: dict[int, list[int]] = {0: [], 1: outcome.token_ids}
    under_way = deque([(second, next_flight)])
    while under_way or scheduler.has_work:
        if plan := scheduler.plan():
            under_way.append((plan, runner.launch(plan.step)))
        plan, in_flight_step = under_way.popleft()
        outcome = scheduler.apply(plan, in_flight_step.wait())
        for request_id, token_id in zip(outcome.request_ids, outcome.token_ids, strict=True):
            tokens[request_id].append(token_id)
    scheduler.check()
    assert tokens == {0: expected((1, 2, 3), 3), 1: expected((4, 5), 3)}


def test_a_failure_and_a_cancel_leave_nothing_of_a_token_that_did_not_come() -> None:
    runner = Unasked()
    scheduler = _with_grammar(runner)
    first = scheduler.plan()
    assert first is not None
    in_flight_step = runner.launch(first.step)
    second = scheduler.plan()
    assert second is not None
    next_flight = runner.launch(second.step)
    scheduler.cancel(1)
    in_flight_step.wait()
    output = StepOutput([[], []], [], {0: "it broke"})
    assert scheduler.apply(first, output).failed == [(0, "it broke")]
    assert scheduler.apply(second, next_flight.wait()).request_ids == []
    assert not scheduler.has_work
    scheduler.check()


def test_one_step_at_a_time_while_a_grammar_is_followed() -> None:
    """Else its sequences would be in every other step, and all run in two halves of a batch."""
    # Enough tokens for all the steps in which a mask is late on a busy machine.
    runner = Recorder(num_pages=64)
    told = Told(runner)
    told.engine.handle(SetVocabulary(VOCABULARY))
    runner.prepare(LETTERS).result(TIMEOUT_S)
    told.submit(1, (4, 5), max_tokens=200)
    told.step()
    assert len(runner.steps) == 2
    told.submit(0, (1, 2, 3), max_tokens=9, ignore_eos=False, grammar=LETTERS)
    while 0 not in told.finished:
        told.step()
        is_between = runner.num_flights == 0
        assert is_between or len(told.tokens[0]) == 0, "counted on a token of the grammar"
    assert "".join(chr(64 + token) for token in told.tokens[0] if token) == "ABCabc"
    told.step()
    assert runner.num_flights == 1
    told.run()
    assert told.tokens[1] == expected((4, 5), 200)


def test_one_step_at_a_time_while_drafts_are_made() -> None:
    """A request that is repeated runs along the cached pages of the first."""
    runner = Recorder()
    told = Told(runner, speculation="auto")
    told.submit(0, (1, 2, 3), max_tokens=20)
    told.run()
    num_steps = len(runner.steps)
    assert told.engine.stats().scheduler.speculation.drafters == ()
    told.submit(1, (1, 2, 3), max_tokens=20)
    while told.engine.has_work:
        told.step()
        assert runner.num_flights == 0
    assert told.tokens[1] == told.tokens[0] == expected((1, 2, 3), 20)
    assert len(runner.steps) - num_steps < num_steps / 2
    drafters = told.engine.stats().scheduler.speculation.drafters
    assert drafters[0].drafter == "prefix"
    assert sum(drafts.accepted_tokens_total for drafts in drafters) > 10


def test_cancelled_with_steps_under_way() -> None:
    told = Told(Recorder())
    told.submit(0, (1, 2, 3), max_tokens=30)
    told.submit(1, (4, 5), max_tokens=30)
    told.step()
    told.engine.handle(Cancel(0))
    told.submit(2, (1, 2, 3), max_tokens=5)
    told.run()
    assert len(told.tokens[0]) == 1
    assert told.tokens[1] == expected((4, 5), 30)
    assert told.tokens[2] == expected((1, 2, 3), 5)


def test_the_last_step_under_way_is_waited_for_though_nobody_wants_it() -> None:
    told = Told(Recorder())
    told.submit(0, (1, 2, 3), max_tokens=30)
    told.step()
    told.engine.handle(Cancel(0))
    assert told.engine.has_work
    told.run()
    assert told.engine.stats().cache.pages_private == 0


def test_a_step_is_not_timed_while_it_waits_for_the_one_before_it() -> None:
    told = Told(Recorder())
    told.submit(0, (1, 2, 3), max_tokens=6)
    told.run()
    # Launched at one tick, the step before over at the next, over itself three ticks later: the
    # engine reads the time before it plans, too.
    decode_s = told.engine._scheduler.pacing.decode_s
    assert decode_s is not None
    assert decode_s <= 3.0
