"""A step that fails ends those requests alone that fail alone; all others get their tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import count
from typing import Any

import pytest

from cache.kv_cache import KVCache
from cache.view import View
from configs.schema import SchedulerSection
from model.fake import FakeRunner, Fault, FaultKind, fake_output
from model.interface import Constraint, SamplingParams
from scheduler.engine import Engine
from scheduler.messages import Cancel, FinishReason, GenerateRequest, StepResult, Submit
from scheduler.plan import StepPlan
from scheduler.scheduler import Scheduler
from scheduler.suspects import PROBE_ID, ModelFaultError

KINDS = list(FaultKind)
PROMPT = (1, 2, 3, 4, 5)


class Served:
    """An engine on a fake model, and all that came of the requests, whose ids are their seeds."""

    def __init__(self, runner: FakeRunner, **config: Any) -> None:
        self.runner = runner
        section = SchedulerSection(
            **{"max_num_seqs": 32, "max_num_batched_tokens": 64, "debug": True} | config
        )
        ticks: Iterator[int] = count()
        self.engine = Engine(runner, section, lambda: float(next(ticks)), lambda _: None)
        self.prompts: dict[int, tuple[int, ...]] = {}
        self.num_tokens: dict[int, int] = {}
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, tuple[FinishReason, str]] = {}

    def submit(
        self, request_id: int, prompt: tuple[int, ...], num_tokens: int = 12, **params: Any
    ) -> None:
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=request_id, **params)
        self.prompts[request_id], self.tokens[request_id] = prompt, []
        self.num_tokens[request_id] = num_tokens
        self.engine.handle(Submit(request_id, GenerateRequest(prompt, sampling)))

    def step(self) -> StepResult:
        result = self.engine.step()
        self.engine.check()
        assert PROBE_ID not in result.request_ids
        for request_id, token_id in zip(result.request_ids, result.token_ids, strict=True):
            self.tokens[request_id].append(token_id)
        errors = [(request_id, FinishReason.ERROR, why) for request_id, why in result.failed]
        for request_id, reason, why in (*((*end, "") for end in result.finished), *errors):
            assert request_id != PROBE_ID, "the probe is nobody's business"
            assert request_id not in self.ends, "ended twice"
            self.ends[request_id] = reason, why
        return result

    def run(self, max_steps: int = 3000) -> None:
        for _ in range(max_steps):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("it does not end")

    def require(self, *failed: int) -> None:
        """Require that exactly these failed, after their tokens, and others have all theirs."""
        ended = [i for i, (reason, _) in self.ends.items() if reason is FinishReason.ERROR]
        assert sorted(ended) == sorted(failed)
        for request_id, prompt in self.prompts.items():
            wanted = fake_output(prompt, self.num_tokens[request_id])
            if request_id in failed:
                wanted = wanted[: len(self.tokens[request_id])]
            else:
                assert self.ends[request_id] == (FinishReason.LENGTH, "")
            assert self.tokens[request_id] == wanted
        stats = self.engine.stats()
        assert stats.cache.pages_private == stats.cache.pages_leased == 0
        assert stats.scheduler.num_running == stats.num_waiting == 0


def runner(max_steps_in_flight: int = 1, faults: Any = None, **fields: Any) -> FakeRunner:
    return FakeRunner(
        max_steps_in_flight=max_steps_in_flight,
        faults={} if faults is None else faults,
        **{"num_pages": 256, "page_size": 4} | fields,
    )


@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 8, 32])
@pytest.mark.parametrize("position", [2, 4, 9], ids=["in the prompt", "its last", "an answer's"])
def test_only_the_one_at_fault_ends(
    num_rows: int, kind: FaultKind, max_steps_in_flight: int, position: int
) -> None:
    guilty = num_rows // 2
    served = Served(runner(max_steps_in_flight, {guilty: Fault(kind, position)}))
    for request_id in range(num_rows):
        served.submit(request_id, (6 + request_id, *PROMPT[1:]))
    served.run()
    served.require(guilty)
    why = "no token has" if kind is FaultKind.NOT_FINITE else "the model failed: RuntimeError"
    assert why in served.ends[guilty][1]
    assert len(served.tokens[guilty]) == max(0, position - len(PROMPT) + 1)


@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_all_at_fault_end_and_none_beside_them(kind: FaultKind, max_steps_in_flight: int) -> None:
    faults = {id_: Fault(kind, 4 + id_ % 5) for id_ in (0, 3, 4, 5, 11)}
    served = Served(runner(max_steps_in_flight, faults))
    for request_id in range(12):
        served.submit(request_id, (6 + request_id, *PROMPT[1:]))
    served.run()
    served.require(*faults)


@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
@pytest.mark.parametrize("which", ["faulty_steps", "faulty_waits"])
def test_a_fault_that_passes_ends_nobody(which: str, max_steps_in_flight: int) -> None:
    served = Served(runner(max_steps_in_flight, **{which: frozenset({1, 14})}))
    for request_id in range(8):
        served.submit(request_id, (*PROMPT, 6 + request_id))
    served.run()
    served.require()
    assert served.engine.stats().scheduler.faulty_rows_total >= 8


@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
@pytest.mark.parametrize("which", ["faulty_steps", "faulty_waits"])
def test_where_nothing_succeeds_any_more_no_request_is_at_fault(
    which: str, max_steps_in_flight: int
) -> None:
    served = Served(runner(max_steps_in_flight, **{which: frozenset(range(4, 1000))}))
    for request_id in range(4):
        served.submit(request_id, PROMPT)
    with pytest.raises(ModelFaultError, match="RuntimeError"):
        served.run()
    assert served.ends == {}


def test_a_model_that_is_never_finite_is_at_fault_itself() -> None:
    class Broken(FakeRunner):
        def _faults_of(self, step: Any) -> dict[int, FaultKind]:
            return dict.fromkeys(range(len(step.slots)), FaultKind.NOT_FINITE)

    served = Served(Broken())
    served.submit(0, PROMPT)
    with pytest.raises(ModelFaultError, match="finite"):
        served.run()


def test_pages_that_are_not_finite_are_read_by_nobody() -> None:
    """The prompt's second page is poisoned, and was cached when its end showed it."""
    served = Served(runner(faults={0: Fault(FaultKind.NOT_FINITE, 5)}), max_num_batched_tokens=32)
    prompt = tuple(range(1, 51))
    served.submit(0, prompt)
    served.step()
    served.submit(1, prompt)
    served.run()
    served.submit(2, prompt)
    served.submit(3, prompt[:20])
    served.run()
    # The first computes its page anew when it runs alone, is found finite, and goes on.
    assert served.ends[2] == served.ends[3] == (FinishReason.LENGTH, "")
    assert served.tokens[2] == served.tokens[1] == fake_output(prompt, 12)
    # The first twice, and the second, which had read the first's pages.
    assert served.engine.stats().scheduler.faulty_rows_total <= 3


def test_two_that_share_pages_which_are_not_finite_both_go_on() -> None:
    """The second, in the midst of its prompt, still leases pages that the first must not read."""
    faults = {0: Fault(FaultKind.NOT_FINITE, 5)}
    served = Served(runner(faults=faults), max_num_batched_tokens=32)
    prompt = tuple(range(1, 51))
    served.submit(0, prompt)
    served.step()
    faults.clear()
    served.submit(1, (*prompt[:33], *range(60, 140)))
    served.run()
    served.require()
    assert served.engine.stats().scheduler.faulty_rows_total == 2
    served.submit(2, prompt)
    [started] = served.step().started
    assert started.cached_tokens == len(prompt) - 1
    served.run()
    served.require()


@pytest.mark.parametrize("num_steps", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", [0, 1])
def test_cancelled_while_it_is_suspected_or_accused(
    kind: FaultKind, num_steps: int, who: int
) -> None:
    served = Served(runner(2, {0: Fault(kind, 6)}))
    for request_id in range(3):
        served.submit(request_id, (6 + request_id, *PROMPT[1:]))
    for _ in range(num_steps):
        served.step()
    served.engine.handle(Cancel(who))
    served.run()
    for request_id in {0, 1, 2} - {who, 0}:
        assert served.tokens[request_id] == fake_output(served.prompts[request_id], 12)
    assert served.engine.stats().cache.pages_private == 0


@pytest.mark.parametrize("kind", KINDS)
def test_suspects_find_room_in_a_full_pool(kind: FaultKind) -> None:
    """One at a time they need no more than before, but others may have grown meanwhile."""
    served = Served(
        runner(2, {4: Fault(kind, 8)}, num_pages=14), max_num_seqs=6, max_num_batched_tokens=16
    )
    for request_id in range(6):
        served.submit(request_id, (*PROMPT, 6 + request_id), 10)
    served.run()
    served.require(4)
    assert served.engine.stats().scheduler.preemptions_total > 0


@pytest.mark.parametrize("num_other_tokens", [5, 14])
def test_a_suspect_that_needs_a_further_page_displaces_another(num_other_tokens: int) -> None:
    """Under a window its table grows with its prompt, of which it may not read the cached pages."""
    faults = {1: Fault(FaultKind.NOT_FINITE, 22)}
    fake = runner(1, faults, num_pages=5, page_size=8, view=View(0, 13))
    served = Served(fake, max_num_seqs=2, max_num_batched_tokens=2)
    served.submit(0, tuple(range(1, 1 + num_other_tokens)), 60)
    served.submit(1, tuple(range(20, 38)))
    while not served.engine.stats().scheduler.faulty_rows_total:
        served.step()
    faults.clear()
    num_preemptions = served.engine.stats().scheduler.preemptions_total
    served.run()
    assert served.ends == dict.fromkeys((0, 1), (FinishReason.LENGTH, ""))
    for request_id, prompt in served.prompts.items():
        wanted = fake_output(prompt, served.num_tokens[request_id], view=fake.view)
        assert served.tokens[request_id] == wanted
    assert served.engine.stats().scheduler.preemptions_total > num_preemptions


def test_a_suspect_that_was_preempted_finds_its_slot_taken() -> None:
    fake = runner(3)
    config = SchedulerSection(max_num_seqs=2, max_num_batched_tokens=32)
    scheduler = Scheduler(KVCache(fake.num_pages, fake.page_size), config, fake.info)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    prompts = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    for request_id, prompt in enumerate(prompts[:2]):
        scheduler.submit(Submit(request_id, GenerateRequest(prompt, params)))
    first = scheduler.plan()
    assert first is not None
    fake.launch(first.step)
    scheduler._table.preempt(first.sequences[1])
    scheduler.submit(Submit(2, GenerateRequest(prompts[2], params, priority=-1)))
    second = scheduler.plan()
    assert second is not None
    assert [sequence.request_id for sequence in second.sequences] == [0, 2]
    in_flight_step = fake.launch(second.step)
    fake.land(0)
    scheduler.fail(first, "it failed")
    assert scheduler.plan() is None, "nobody is alone while a step is under way"
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    plan: StepPlan | None = second
    while plan is not None:
        outcome = scheduler.apply(plan, in_flight_step.wait())
        scheduler.check()
        for request_id, token_id in zip(outcome.request_ids, outcome.token_ids, strict=True):
            tokens[request_id].append(token_id)
        plan = scheduler.plan()
        if plan is not None:
            in_flight_step = fake.launch(plan.step)
    assert tokens == {i: fake_output(prompt, 5) for i, prompt in enumerate(prompts)}
    assert scheduler.stats().preemptions_total == 2


def test_what_is_told_of_a_prompt_is_told_once() -> None:
    served = Served(runner(2, {1: Fault(FaultKind.WAIT, 7)}), max_num_batched_tokens=32)
    prompt = tuple(range(1, 40))
    scored = 0
    for request_id in range(2):
        served.submit(request_id, prompt, prompt_logprobs=0)
    while served.engine.has_work:
        for request_id, scores in served.step().prompt_logprobs:
            scored += len(scores) * (request_id == 0)
    served.require(1)
    assert scored == len(prompt) - 1


class Careless(FakeRunner):
    """Raises an error that a grammar should not raise, at once or later."""

    def prepare(self, grammar: str) -> Future[Constraint]:
        if grammar == "at once":
            raise RuntimeError(grammar)
        later: Future[Constraint] = Future()
        later.set_exception(RuntimeError(grammar))
        return later


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_grammar_whose_preparation_raises_ends_its_request_alone(when: str) -> None:
    served = Served(Careless())
    served.submit(0, PROMPT)
    served.submit(1, PROMPT, grammar=when)
    served.run()
    assert served.ends[1] == (FinishReason.ERROR, "the grammar failed: RuntimeError")
    assert served.tokens[0] == fake_output(PROMPT, 12)


@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
@pytest.mark.parametrize("num_requests", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_many_requests_with_a_fault_in_a_random_row_every_fifty_steps(
    num_requests: int, max_steps_in_flight: int
) -> None:
    """As many as run at a time, each kind of fault, and prompts that share their beginnings."""
    rng = random.Random(max_steps_in_flight)
    faults: dict[int, Fault] = {}
    served = Served(
        runner(max_steps_in_flight, faults, num_pages=400, vocab_size=500, is_strict=False),
        max_num_batched_tokens=256,
        debug=False,
    )
    waiting = iter(range(num_requests))
    for number in count():
        while (
            len(served.tokens) - len(served.ends) < 40 and (new := next(waiting, None)) is not None
        ):
            stem = tuple(range(1, 1 + rng.choice((4, 9, 17))))
            served.submit(new, (*stem, 20 + new % 400, 1 + new // 400), rng.randrange(8, 40))
        if not served.engine.has_work:
            break
        running = [s for s in served.engine._scheduler._running if s.request_id >= 0]
        if number % 50 == 49 and running:
            sequence = rng.choice(running)
            # The next token to be planned; the step in flight is past the ones before it.
            faults.setdefault(
                sequence.request_id, Fault(rng.choice(KINDS), len(sequence.token_ids))
            )
        served.step()
    # Some end before they get there.
    failed = [i for i, (reason, _) in served.ends.items() if reason is FinishReason.ERROR]
    assert set(failed) <= set(faults)
    assert len(failed) > 0.5 * len(faults) > 1
    for request_id in set(faults) - set(failed):
        num_tokens = len(served.prompts[request_id]) + served.num_tokens[request_id]
        assert num_tokens <= faults[request_id].position + 1
    for request_id, prompt in served.prompts.items():
        wanted = fake_output(prompt, served.num_tokens[request_id], 500)
        got = served.tokens[request_id]
        assert got == (wanted[: len(got)] if request_id in failed else wanted)
    stats = served.engine.stats()
    assert stats.cache.pages_private == stats.cache.pages_leased == 0
