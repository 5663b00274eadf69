"""What to compute next: requests and results in, plans and outcomes out.

Knows nothing of time, tensors, text, processes or HTTP. The same inputs give the same plans: no
clock, no chance, no sets where order matters.

One token budget a step, no phases (as in vLLM v1): sequences that lack one token (decodes) come
first, chunks of prompts fill what is left, newcomers come last.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

from cache.kv_cache import KVCache
from configs.schema import SchedulerSection
from model.interface import (
    NO_TOKEN,
    PENDING_TOKEN,
    Constraint,
    ModelInfo,
    PageCopy,
    StepOutput,
)
from scheduler.messages import FinishReason, Rejected, RejectKind, StepResult, Submit
from scheduler.pacing import Pacing
from scheduler.plan import StepPlan, add_row, new_plan
from scheduler.refusal import Room, displaced, place_for, why_never
from scheduler.sequence import Sequence, State
from scheduler.stats import SchedulerStats
from scheduler.suspects import ModelFaultError, Suspects
from scheduler.table import SequenceTable

#: Those that wait for a page under computation and are looked at in one step all the same: each
#: look is a search as long as its prefix, and a thousand of them would stall those who decode.
_MOST_HELD_BACK = 32
_NOT_FINITE = "no token has a finite logit"


class Scheduler:
    """Decides, for one cache and one model, what each step computes."""

    def __init__(self, cache: KVCache, config: SchedulerSection, info: ModelInfo) -> None:
        self._cache = cache
        self._config = config
        self._page_size = info.page_size
        # The newest token of a sequence needs no place: its keys are never read.
        self._max_model_len = min(info.max_model_len, info.num_pages * info.page_size + 1)
        self._eos_token_ids = info.eos_token_ids
        self._pacing = Pacing(config.max_decode_slowdown)
        self._table = SequenceTable(cache, config.max_num_seqs)
        self._waiting, self._running = self._table.waiting, self._table.running
        self._suspects = Suspects()
        #: Steps that were planned and neither applied nor failed.
        self._num_under_way = 0
        self._num_arrivals = 0
        self._prefix_queries_tokens = 0
        self._prefix_hits_tokens = 0
        self._prompt_tokens_computed = 0
        self._num_late_rows = 0
        self._num_faulty_rows = 0
        self._num_steps = 0

    # ---- requests in and out ---------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a plan would have something in it, now or once others have gone on."""
        return bool(self._table.requests)

    @property
    def follows_grammars(self) -> bool:
        """Whether a running sequence has a grammar, which must know a token before the next."""
        return any(sequence.constraint is not None for sequence in self._running)

    def submit(self, submit: Submit, constraint: Constraint | None = None) -> list[Rejected]:
        """Queue a request; return its refusal, or those of whom it displaced in a full queue.

        `constraint`: of its grammar.
        """
        found = self._place_for(submit)
        if isinstance(found, Rejected):
            return [found]
        for leaving in found:
            self._finish(leaving, FinishReason.ABORT)
        sequence = Sequence(
            submit,
            arrival=self._num_arrivals,
            eos_token_ids=self._eos_token_ids,
            max_model_len=self._max_model_len,
            constraint=constraint,
        )
        self._num_arrivals += 1
        self._table.add(sequence)
        return [displaced(leaving) for leaving in found]

    def _place_for(self, submit: Submit) -> Rejected | list[Sequence]:
        if submit.request_id in self._table.requests:
            message = f"request id {submit.request_id} is in use"
            return Rejected(submit.request_id, RejectKind.INVALID, message, "request_id")
        free_pages = self._cache.available_pages - len(self._running)
        room = Room(len(self._table.free_slots), free_pages, self._page_size)
        never = why_never(submit, self._max_model_len)
        return never or place_for(submit, self._waiting, room, self._config)

    def cancel(self, request_id: int) -> None:
        """Forget a request and give its pages back, at once. Unknown ids are fine."""
        sequence = self._table.requests.get(request_id)
        if sequence is not None:
            self._finish(sequence, FinishReason.ABORT)

    # ---- planning --------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """Choose the next step, or None where there is nothing to do before one is applied.

        Every plan is followed by one `apply` or `fail` of it, in the order of the plans; others may
        be made before. They count on what is under way: its keys and values, and a token of each
        row that samples, for which `PENDING_TOKEN` stands until `apply` brings it. A sequence that
        turns out to have ended has computed a token in vain, and nobody hears of it.
        """
        if self._suspects:
            plan = None if self._num_under_way else self._plan_suspect()
        else:
            plan = self._plan_batch()
        self._num_under_way += plan is not None
        return plan

    def _plan_batch(self) -> StepPlan | None:
        plan = new_plan()
        num_preemptions = self._table.num_preemptions
        self._plan_decodes(plan)
        num_decodes = len(plan.sequences)
        budget = self._config.max_num_batched_tokens - num_decodes
        left = budget = self._pacing.prompt_tokens(budget, num_decodes=num_decodes)
        left = self._plan_prompts(plan, left)
        if self._table.num_preemptions == num_preemptions:
            left = self._admit(plan, left)
        if not plan.sequences:
            return None
        return replace(plan, num_decodes=num_decodes, num_prompt_tokens=budget - left)

    def _plan_suspect(self) -> StepPlan:
        """Plan a step of the current suspect alone; others keep their pages while there is room."""
        plan, sequence = new_plan(), self._suspects.current
        if sequence.allocation is None or not self._table.grow(sequence):
            while not self._start(plan, sequence, reserve_pages=0):
                self._table.preempt(self._running[-1])
        missing = len(sequence.token_ids) - sequence.num_computed
        count = min(missing, self._config.max_num_batched_tokens)
        add_row(plan, sequence, count)
        return replace(plan, num_prompt_tokens=count)

    def _plan_decodes(self, plan: StepPlan) -> None:
        running, page_size = self._running, self._page_size
        row = 0
        while row < len(running):
            sequence = running[row]
            num_tokens = len(sequence.token_ids)
            if num_tokens - sequence.num_computed == 1 and not sequence.awaits_token:
                allocation = sequence.allocation
                assert allocation is not None, "a running sequence without pages"
                is_full = num_tokens > len(allocation.page_ids) * page_size
                if is_full and not self._table.grow(sequence):
                    continue
                add_row(plan, sequence, 1)
            row += 1

    def _plan_prompts(self, plan: StepPlan, budget_tokens: int) -> int:
        for sequence in self._running:
            missing = len(sequence.token_ids) - sequence.num_computed
            if budget_tokens == 0:
                break
            if missing > 1:
                count = min(missing, budget_tokens)
                add_row(plan, sequence, count)
                budget_tokens -= count
        return budget_tokens

    def _admit(self, plan: StepPlan, budget_tokens: int) -> int:
        """Let in who fits, in order of precedence; who does not fit holds up those behind.

        A request whose next page a running sequence is computing right now waits for that page
        instead of computing it twice, and holds up nobody (unless `_MOST_HELD_BACK` such wait).
        """
        free_slots = self._table.free_slots
        if budget_tokens == 0 or not free_slots or not self._waiting:
            return budget_tokens
        num_looked_at = len(free_slots) + _MOST_HELD_BACK
        for sequence in list(islice(self._waiting, num_looked_at)):
            if sequence.token_ids[-1] == PENDING_TOKEN:
                # Preempted with a step under way, which is to bring its newest token.
                break
            if (
                sequence.most_cached_tokens is None
                and self._cache.match(sequence.token_ids, sequence.request.namespace).in_flight
            ):
                continue
            # One page for each that runs: nobody is let in only to be preempted soon after.
            if not self._start(plan, sequence, reserve_pages=len(self._running)):
                break
            count = min(len(sequence.token_ids) - sequence.num_computed, budget_tokens)
            add_row(plan, sequence, count)
            budget_tokens -= count
            if budget_tokens == 0 or not free_slots:
                break
        return budget_tokens

    def _start(self, plan: StepPlan, sequence: Sequence, reserve_pages: int) -> bool:
        if not self._table.free_slots:
            return False
        allocation = self._table.admit(sequence, reserve_pages)
        if allocation is None:
            return False
        plan.step.started.append(sequence.slot_start())
        plan.step.copies.extend(
            PageCopy(copy.source, copy.target, copy.num_tokens) for copy in allocation.copies
        )
        if not sequence.is_started:
            sequence.is_started = True
            num_cached = allocation.num_cached_tokens
            self._prefix_queries_tokens += len(sequence.token_ids)
            self._prefix_hits_tokens += num_cached
            plan.started.append((sequence.request_id, num_cached, allocation.miss_reason))
        return True

    # ---- results ---------------------------------------------------------------------------------

    def apply(self, plan: StepPlan, output: StepOutput, elapsed_s: float = 0.0) -> StepResult:
        """Take in what a plan's step sampled, and how long it took (0: not measured)."""
        self._num_steps += 1
        self._num_under_way -= 1
        self._prompt_tokens_computed += plan.num_prompt_tokens
        if elapsed_s and not self._suspects:
            self._pacing.observe(
                elapsed_s,
                num_decodes=plan.num_decodes,
                num_prompt_tokens=plan.num_prompt_tokens,
            )
        self._advance(plan, output.token_ids)
        outcome = StepResult()
        self._note_scores(plan, output, outcome)
        step, logprobs = plan.step, output.logprobs
        for index, row in enumerate(step.sample_rows):
            if plan.is_void(row):
                continue
            sequence = plan.sequences[row]
            position = step.starts[row] + step.counts[row]
            token_id = output.token_ids[index]
            if sequence.params.max_tokens == 0 and index not in output.not_finite:
                self._stop_if_due(sequence, position - 1, outcome)
            elif token_id == NO_TOKEN:
                self._go_without(sequence, position, output, index, outcome)
            else:
                sequence.token_ids[position] = token_id
                outcome.request_ids.append(sequence.request_id)
                outcome.token_ids.append(token_id)
                if logprobs:
                    outcome.logprobs.append(logprobs[index])
                self._stop_if_due(sequence, position, outcome)
        if self._suspects:
            self._judge(plan, outcome)
        return outcome

    def _stop_if_due(self, sequence: Sequence, position: int, outcome: StepResult) -> None:
        reason = sequence.stop_reason(position)
        if reason is not None:
            self._finish(sequence, reason)
            outcome.finished.append((sequence.request_id, reason))

    def _go_without(
        self,
        sequence: Sequence,
        position: int,
        output: StepOutput,
        index: int,
        outcome: StepResult,
    ) -> None:
        """Take in that a row got no token for `position`."""
        if index in output.not_finite:
            sequence.trusts_cache = False
            self._suspect(sequence, position, _NOT_FINITE)
            return
        self._take_back(sequence, position)
        if index in output.failures:
            self._finish(sequence, FinishReason.ERROR)
            outcome.failed.append((sequence.request_id, output.failures[index]))
        else:
            self._num_late_rows += 1

    def _note_scores(self, plan: StepPlan, output: StepOutput, outcome: StepResult) -> None:
        for span, scores in zip(plan.step.scored, output.prompt_logprobs, strict=True):
            if plan.is_void(span.row):
                continue
            sequence = plan.sequences[span.row]
            # Preempted with a step under way and back, it may have two steps that score the same.
            num_known = sequence.num_scored - plan.step.starts[span.row] - span.offset
            assert num_known >= 0, "a prompt's scores have a gap"
            if new := scores[num_known:]:
                sequence.num_scored += len(new)
                outcome.prompt_logprobs.append((sequence.request_id, new))

    def _take_back(self, sequence: Sequence, position: int) -> None:
        """Undo what was counted on for a token that did not come."""
        assert len(sequence.token_ids) == position + 1, "a step counts on a token that did not come"
        if sequence.state is State.WAITING:
            self._waiting.drop_last_token(sequence)
        else:
            del sequence.token_ids[-1]
            sequence.num_computed -= 1

    def _advance(self, plan: StepPlan, token_ids: list[int]) -> None:
        page_size, step = self._page_size, plan.step
        # A row without a token has its last one computed again: that is what samples the next.
        sampled = zip(step.sample_rows, token_ids, strict=False)
        again = {row for row, token_id in sampled if token_id == NO_TOKEN}
        for row, count in enumerate(step.counts):
            sequence = plan.sequences[row]
            allocation = sequence.allocation
            # Meanwhile it may have ended or been preempted, or even have come back.
            if allocation is None or allocation.page_ids is not step.page_ids[row]:
                continue
            before = sequence.num_landed
            sequence.num_landed = before + count - (row in again)
            if sequence.num_landed // page_size != before // page_size:
                self._cache.commit(allocation, sequence.token_ids, sequence.num_landed)

    # ---- faults ----------------------------------------------------------------------------------

    def fail(self, plan: StepPlan, why: str) -> None:
        """Take back a step that raised: its sequences run again, alone, one after another.

        One that fails alone is ended, `why` told in an outcome, once a probe has shown that the
        model still computes. Raises `ModelFaultError` if the probe is what failed.
        """
        self._num_under_way -= 1
        for row, sequence in enumerate(plan.sequences):
            if not plan.is_void(row):
                self._suspect(sequence, plan.step.starts[row] + plan.step.counts[row], why)

    def _suspect(self, sequence: Sequence, num_tokens: int, why: str) -> None:
        """Roll back a sequence that failed while `num_tokens` of its tokens were computed."""
        if sequence is self._suspects.probe:
            raise ModelFaultError(why)
        self._num_faulty_rows += 1
        self._table.roll_back(sequence)
        # Since a rollback voids all steps before, a suspect fails only in a step of its own.
        if sequence in self._suspects:
            self._table.add(self._suspects.accuse(sequence, why))
        else:
            self._suspects.add(sequence, num_tokens)

    def _judge(self, plan: StepPlan, outcome: StepResult) -> None:
        """See what a step that did not fail says about the suspect that may have been in it."""
        sequence = plan.sequences[0]
        if sequence is self._suspects.probe:
            outcome.finished.clear()
            accused, why = self._suspects.convict()
            self._table.finish(accused, FinishReason.ERROR)
            outcome.failed.append((accused.request_id, why))
        elif not plan.is_void(0):
            self._suspects.clear(sequence)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._table.finish(sequence, reason)
        if probe := self._suspects.drop(sequence):
            self._table.finish(probe, FinishReason.ABORT)

    # ---- looking in ------------------------------------------------------------------------------

    def stats(self) -> SchedulerStats:
        """Return a snapshot."""
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_waiting_tokens=self._waiting.num_tokens,
            lowest_waiting_priority=self._waiting.lowest_priority,
            prefix_queries_tokens_total=self._prefix_queries_tokens,
            prefix_hits_tokens_total=self._prefix_hits_tokens,
            prompt_tokens_computed_total=self._prompt_tokens_computed,
            preemptions_total=self._table.num_preemptions,
            late_rows_total=self._num_late_rows,
            faulty_rows_total=self._num_faulty_rows,
            steps_total=self._num_steps,
        )

    def check(self) -> None:
        """Assert every invariant, the cache's too."""
        self._cache.check()
        self._pacing.check()
        self._suspects.check()
        self._table.check(self._page_size)
