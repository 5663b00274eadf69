"""Any order of submit, cancel, step and fault leaves every invariant whole and every token right.

The model's keys and values are digests of the prefix they belong to (`model/fake.py`). A page that
is shared wrongly, freed too early or evicted in use therefore gives a wrong token or a failed
read-back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from scripted_drafter import ScriptedDrafter

from cache.groups import GroupedCache
from cache.selection import Selection
from cache.view import FULL_VIEW, View
from configs.schema import SchedulerSection
from model.fake import FAKE_EOS_TOKEN_ID, FakeRunner, fake_logprobs, fake_next_token
from model.interface import (
    MAX_BOUNDED_LEN,
    InFlightStep,
    SamplingParams,
    SlotStart,
    StepOutput,
    TokenLogprobs,
    WindowedPages,
)
from scheduler.caches import build_cache
from scheduler.compaction import has_room, why_no_room
from scheduler.messages import FinishReason, GenerateRequest, Submit
from scheduler.plan import StepPlan
from scheduler.scheduler import Scheduler
from scheduler.sequence import State
from scheduler.suspects import PROBE_ID

_VOCAB = 3
MAX_LEN = 16
SELECTIONS = [None, None, Selection(1, 2, interval=2), Selection(2, 4, "max", 3)]


class Hesitant(FakeRunner):
    """Ignores grammars; a sequence with a late one gets no token, with a failed one it ends."""

    mood = ""

    def _start(self, start: SlotStart) -> None:
        FakeRunner._start(self, replace(start, constraint=None))

    def _sample(self, slot: int, digest: int) -> int | str | None:
        if not self.mood or self._slots[slot].params.grammar is None:
            return FakeRunner._sample(self, slot, digest)
        return "it failed" if self.mood == "fails" else None


def _is_probe(plan: StepPlan) -> bool:
    """Return whether a plan is the probe of the model; where it fails, so does the engine."""
    return plan.sequences[0].request_id == PROBE_ID


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.submits: dict[int, Submit] = {}
        self.outputs: dict[int, list[int]] = {}
        self.scores: dict[int, list[TokenLogprobs]] = {}
        self.num_submits = 0
        #: Requests that were alone in a step that failed.
        self.failed_alone: set[int] = set()
        self.drafts = "mixed"
        self.build(4, 2, 2, 4, 1)

    def build(
        self,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        budget: int,
        max_steps_in_flight: int,
        max_queue: int = 1024,
        view: View = FULL_VIEW,
        num_windowed_pages: int = 0,
    ) -> None:
        windowed = None
        if num_windowed_pages and view.window is not None:
            windowed = WindowedPages(num_windowed_pages, 4, View(window=view.window))
            view = FULL_VIEW
        self.view = view
        self.in_flight: deque[tuple[StepPlan, InFlightStep]] = deque()
        self.runner = Hesitant(
            vocab_size=_VOCAB,
            max_model_len=MAX_LEN,
            num_pages=num_pages,
            page_size=page_size,
            max_steps_in_flight=max_steps_in_flight,
            view=view,
            windowed=windowed,
            guess_period=3 if self.drafts == "guessed" else 0,
        )
        budget = max(budget, max_num_seqs)
        section = SchedulerSection(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_queue=max_queue,
        )
        self.cache = build_cache(self.runner.info, section)
        self.scheduler = Scheduler(
            self.cache,
            section,
            self.runner.info,
            ScriptedDrafter(self.guess, is_too_long=True),
        )

    @precondition(lambda self: self.num_submits == 0)
    @rule(
        num_pages=st.integers(1, 8),
        page_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(1, 8),
        max_steps_in_flight=st.integers(1, 3),
        max_queue=st.sampled_from([0, 1, 3, 1024]),
        view=st.builds(View, st.sampled_from([0, 0, 2]), st.sampled_from([None, 1, 3, 5, 8])),
        drafts=st.sampled_from(["right", "mixed", "wrong", "guessed", "none"]),
        num_windowed_pages=st.sampled_from([0, 0, 2, 4, 8]),
    )
    def rebuild(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        budget: int,
        max_steps_in_flight: int,
        max_queue: int,
        view: View,
        drafts: str,
        num_windowed_pages: int,
    ) -> None:
        self.drafts = drafts
        sizes = num_pages, page_size, max_num_seqs, budget, max_steps_in_flight, max_queue
        self.build(*sizes, view, num_windowed_pages)

    def guess(self, token_ids: list[int], max_tokens: int) -> list[int]:
        """Return more tokens than may be used: the right ones, wrong ones or some of both."""
        known = list(token_ids)
        if self.drafts in {"none", "guessed"}:
            return []
        for count in range(max_tokens + 2):
            token_id = fake_next_token(known, _VOCAB, may_end=False, view=self.view)
            is_wrong = self.drafts == "wrong" or (self.drafts == "mixed" and count == 2)
            known.append(3 - token_id if is_wrong else token_id)
        return known[len(token_ids) :]

    @rule(
        prompt=st.lists(st.integers(1, 2), max_size=12),
        max_tokens=st.integers(0, 8),
        priority=st.integers(0, 1),
        namespace=st.sampled_from(["", "salt"]),
        ignore_eos=st.booleans(),
        num_resumed=st.integers(0, 2),
        prompt_logprobs=st.sampled_from([None, None, 0, 2]),
        num_scored=st.integers(0, 4),
        grammar=st.sampled_from([None, None, "any"]),
        may_speculate=st.sampled_from([True, True, False]),
        own_view=st.sampled_from([FULL_VIEW, FULL_VIEW, View(0, 4), View(2, 3)]),
        selection=st.sampled_from(SELECTIONS),
    )
    def submit(
        self,
        *,
        prompt: list[int],
        max_tokens: int,
        priority: int,
        namespace: str,
        ignore_eos: bool,
        num_resumed: int,
        prompt_logprobs: int | None,
        num_scored: int,
        grammar: str | None,
        may_speculate: bool,
        own_view: View,
        selection: Selection | None,
    ) -> None:
        selection = None if self.view != FULL_VIEW or self.runner.windowed else selection
        params = SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar,
        )
        submit = Submit(
            self.num_submits,
            GenerateRequest(
                tuple(prompt),
                params,
                priority,
                namespace,
                may_speculate=may_speculate,
                view=own_view if selection is None else FULL_VIEW,
                selection=selection,
            ),
        )
        self.num_submits += 1
        resumed = self.expected(submit)[:num_resumed]
        if len(resumed) == num_resumed < max_tokens and FAKE_EOS_TOKEN_ID not in resumed:
            num_scored = len(prompt) if num_resumed else num_scored
            if prompt_logprobs is None or not prompt:
                num_scored = 0
            submit = Submit(
                submit.request_id,
                submit.request,
                output_token_ids=tuple(resumed),
                num_scored=min(num_scored, max(0, len(prompt) - 1)),
            )
        fits = bool(prompt) and len(prompt) + len(submit.output_token_ids) < self.max_len(submit)
        fits &= not why_no_room(submit, self.max_len(submit), self.cache.bounds)
        waiting = [*self.scheduler._waiting]
        refusals = self.scheduler.submit(submit, constraint=grammar)
        is_taken = fits and [one.request_id for one in refusals] != [submit.request_id]
        assert fits or refusals, "taken in, though it never fits"
        if fits and not is_taken and self.scheduler._config.max_queue:
            assert all(one.request.priority <= priority or one.has_begun for one in waiting)
        if is_taken:
            for refused in refusals:
                [gone] = [one for one in waiting if one.request_id == refused.request_id]
                assert gone.request.priority > priority, "displaced by one that has no precedence"
                assert self.outputs[gone.request_id] == [], "displaced though it had begun"
                del self.submits[gone.request_id]
            self.submits[submit.request_id] = submit
            self.outputs[submit.request_id] = list(submit.output_token_ids)
            self.scores[submit.request_id] = self.expected_scores(submit)[: submit.num_scored]

    def expected_scores(self, submit: Submit) -> list[TokenLogprobs]:
        prompt, count = submit.request.prompt_token_ids, submit.request.params.prompt_logprobs
        if count is None:
            return []
        view = self.view_of(submit)
        return [fake_logprobs(prompt[:i], prompt[i], count, view) for i in range(1, len(prompt))]

    def view_of(self, submit: Submit) -> View:
        return submit.request.view.within(self.view)

    def max_len(self, submit: Submit) -> int:
        if has_room(submit, self.cache.bounds):
            return MAX_LEN
        view = self.view_of(submit)
        most = MAX_LEN if view == self.view else MAX_BOUNDED_LEN
        own = [(one.bounds, one.search.own_view(view)) for one in self.cache.groups]
        return min(most, *(bounds.max_tokens(view) + 1 for bounds, view in own))

    def expected(self, submit: Submit) -> list[int]:
        tokens = list(submit.request.prompt_token_ids)
        end = min(len(tokens) + submit.request.params.max_tokens, self.max_len(submit))
        may_end = not submit.request.params.ignore_eos
        while tokens and len(tokens) < end:
            view = self.view_of(submit)
            token_id = fake_next_token(
                tokens,
                _VOCAB,
                may_end=may_end,
                view=view,
                selection=submit.request.selection,
                num_prompt=len(submit.request.prompt_token_ids),
            )
            tokens.append(token_id)
            if tokens[-1] == FAKE_EOS_TOKEN_ID and may_end:
                break
        return tokens[len(submit.request.prompt_token_ids) :]

    @rule(pick=st.integers(0, 100))
    @precondition(lambda self: self.submits)
    def cancel(self, pick: int) -> None:
        request_id = sorted(self.submits)[pick % len(self.submits)]
        self.scheduler.cancel(request_id)
        del self.submits[request_id]

    @rule(mood=st.sampled_from(["", "", "late", "fails"]))
    @precondition(lambda self: len(self.in_flight) < self.runner.max_steps_in_flight)
    def launch(self, mood: str) -> None:
        plan = self.plan()
        self.runner.mood = mood
        if plan is not None:
            self.in_flight.append((plan, self.runner.launch(plan.step)))

    def plan(self) -> StepPlan | None:
        running = list(self.scheduler._table.running)
        plan = self.scheduler.plan()
        preempted = [one.state is State.WAITING for one in running if one.selection is None]
        assert preempted == sorted(preempted), "preempted one that had precedence"
        if plan is not None:
            assert plan.num_tokens <= self.scheduler._config.max_num_batched_tokens
            num_decoded = plan.num_decodes + plan.num_draft_tokens
            assert num_decoded + plan.num_prompt_tokens == plan.num_tokens
        return plan

    @rule()
    @precondition(lambda self: self.in_flight)
    def land(self) -> None:
        plan, in_flight_step = self.in_flight.popleft()
        self.apply(plan, in_flight_step.wait())

    @rule(pick=st.integers(0, 3))
    @precondition(lambda self: self.in_flight)
    def land_with_a_row_that_is_not_finite(self, pick: int) -> None:
        plan, in_flight_step = self.in_flight.popleft()
        output = in_flight_step.wait()
        if output.token_ids and not _is_probe(plan):
            index = pick % len(output.token_ids)
            output.token_ids[index] = []
            output = replace(output, not_finite=[index], failures={})
            self.note_a_failure_alone(plan)
        self.apply(plan, output)

    def apply(self, plan: StepPlan, output: StepOutput) -> None:
        outcome = self.scheduler.apply(plan, output)
        for request_id, scores in outcome.prompt_logprobs:
            self.scores[request_id] += scores
        for request_id, token_id in zip(outcome.request_ids, outcome.token_ids, strict=True):
            self.outputs[request_id].append(token_id)
        for request_id, why in outcome.failed:
            submit = self.submits.pop(request_id)
            if why == "it failed":
                assert submit.request.params.grammar is not None
            else:
                assert request_id in self.failed_alone, "ended for what it did not do alone"
            tokens = self.outputs[request_id]
            assert tokens == self.expected(submit)[: len(tokens)]
        for request_id, reason in outcome.finished:
            submit = self.submits.pop(request_id)
            assert self.outputs[request_id] == self.expected(submit)
            assert self.scores[request_id] == self.expected_scores(submit)
            assert (reason is FinishReason.STOP) == (
                self.outputs[request_id][-1:] == [FAKE_EOS_TOKEN_ID]
                and not submit.request.params.ignore_eos
            )

    @rule(has_written=st.booleans())
    @precondition(lambda self: len(self.in_flight) < self.runner.max_steps_in_flight)
    def fault_at_launch(self, has_written: bool) -> None:
        """Fail a launch; its copies and writes may or may not have happened, as in a real step."""
        plan = self.plan()
        if plan is None:
            return
        if has_written or _is_probe(plan):
            in_flight_step = self.runner.launch(plan.step)
            if _is_probe(plan):
                self.in_flight.append((plan, in_flight_step))
                return
            self.runner._in_flight.pop()
        self.fail(plan)

    @rule()
    @precondition(lambda self: self.in_flight)
    def fault_while_waited_for(self) -> None:
        plan, in_flight_step = self.in_flight.popleft()
        output = in_flight_step.wait()
        if _is_probe(plan):
            self.apply(plan, output)
        else:
            self.fail(plan)

    def fail(self, plan: StepPlan) -> None:
        self.note_a_failure_alone(plan)
        self.scheduler.fail(plan, "it raised")

    def note_a_failure_alone(self, plan: StepPlan) -> None:
        if len(plan.sequences) == 1:
            self.failed_alone.add(plan.sequences[0].request_id)

    @invariant()
    def everything_holds(self) -> None:
        self.scheduler.check()
        # All pages that are read from now on were written by a step launched after this.
        self.runner.pages.forget(self.cache._pool.free_ids)
        if isinstance(self.cache, GroupedCache):
            self.runner.windowed_pages.forget(self.cache.windowed._pool.free_ids)
        assert self.scheduler.has_work == bool(self.submits)

    def teardown(self) -> None:
        """End all requests, in any state; nothing stays held."""
        for _ in range(400):
            if not self.scheduler.has_work and not self.in_flight:
                break
            while len(self.in_flight) < self.runner.max_steps_in_flight:
                before = len(self.in_flight)
                self.launch("")
                if len(self.in_flight) == before:
                    break
            if self.in_flight:
                self.land()
        assert not self.submits
        stats = self.cache.stats()
        assert stats.pages_private == stats.pages_leased == 0
        assert self.scheduler.stats().num_running == self.scheduler.stats().num_waiting == 0


TestSchedulerMachine = SchedulerMachine.TestCase
