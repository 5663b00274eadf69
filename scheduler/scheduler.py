"""What to compute next: requests and results in, plans and outcomes out.

Knows nothing of time, tensors, text, processes or HTTP. The same inputs give the same plans.

One token budget a step, no phases (as in vLLM v1): decodes first, then chunks, then newcomers.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

from cache.kv_cache import KVCache
from configs.schema import SchedulerSection
from model.interface import PENDING_TOKEN, Constraint, ModelInfo, StepOutput
from scheduler.admission import displaced, max_len, place_for, room_in, why_never
from scheduler.drafters.draft import Drafter
from scheduler.landing import advance, land_drafts, note_scores
from scheduler.lookups import Lookups
from scheduler.messages import FinishReason, Rejected, RejectKind, StepResult, Submit
from scheduler.pacing import Pacing
from scheduler.plan import StepPlan, add_row, new_plan
from scheduler.prospects import Prospects
from scheduler.sequence import Sequence
from scheduler.speculation import Speculation
from scheduler.stats import SchedulerStats
from scheduler.suspects import ModelFaultError, Suspects
from scheduler.table import SequenceTable

#: Requests waiting for a page under computation that one step looks up all the same. Each look-up
#: is a search as long as its prefix: a thousand of them would stall the decodes.
_MAX_HELD_BACK = 32
_NOT_FINITE = "no token has a finite logit"


class Scheduler:
    """Chooses the rows of each step, for one cache and one model."""

    def __init__(
        self,
        cache: KVCache,
        config: SchedulerSection,
        info: ModelInfo,
        drafter: Drafter | None = None,
    ) -> None:
        self._cache = cache
        self._config = config
        self._info = info
        self.pacing = Pacing(config.max_decode_slowdown)
        self._speculation = Speculation(
            drafter,
            config.drafting.max_tokens,
            self.pacing,
            has_draft_model=bool(info.draft_model),
        )
        self._table = SequenceTable(cache, config.max_num_seqs, info.page_size)
        self._waiting, self._running = self._table.waiting, self._table.running
        self._suspects = Suspects()
        self._prospects = Prospects(cache)
        #: Whether pages were lacking for the first waiting request at its last look-up.
        self._is_blocked = False
        #: Steps that were planned and neither applied nor failed.
        self._num_under_way = 0
        self._num_arrivals = 0
        self._lookups = Lookups()
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
    def awaits_tokens(self) -> bool:
        """Whether a running sequence has a grammar or drafts, which follow known tokens alone."""
        may_draft = self._speculation.is_on
        return any(
            sequence.constraint is not None or (may_draft and sequence.request.may_speculate)
            for sequence in self._running
        )

    def submit(self, submit: Submit, constraint: Constraint | None = None) -> list[Rejected]:
        """Queue a request; return its refusal, or those of the requests it displaced.

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
            eos_token_ids=self._info.eos_token_ids,
            max_model_len=max_len(submit, self._info, self._cache),
            constraint=constraint,
            model_view=self._info.view,
        )
        self._num_arrivals += 1
        self._table.add(sequence)
        return [displaced(leaving) for leaving in found]

    def _place_for(self, submit: Submit) -> Rejected | list[Sequence]:
        if submit.request_id in self._table.requests:
            message = f"request id {submit.request_id} is in use"
            return Rejected(submit.request_id, RejectKind.INVALID, message, "request_id")
        num_free_slots, num_running = len(self._table.free_slots), len(self._running)
        room = room_in(self._cache, submit.request.view, num_free_slots, num_running)
        never = why_never(submit, max_len(submit, self._info, self._cache), self._cache.bounds)
        probe = None if self._suspects.probe in self._running else self._suspects.probe
        return never or place_for(submit, self._waiting, room, self._config, probe)

    def cancel(self, request_id: int) -> None:
        """Forget a request and give its pages back, at once. Unknown ids are fine."""
        sequence = self._table.requests.get(request_id)
        if sequence is not None:
            self._finish(sequence, FinishReason.ABORT)

    # ---- planning --------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """Choose the next step, or None where there is nothing to do before one is applied.

        Every plan is followed by one `apply` or `fail` of it, in the order of the plans; others may
        be made before. They rely on the steps under way: on their keys and values, and on a token
        of each row that samples. `PENDING_TOKEN` stands for it until `apply`. A token computed
        for a sequence that has ended meanwhile is dropped.
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
        num_prompts = len(self._running) - num_decodes
        if not self._is_blocked:
            num_prompts += min(len(self._table.free_slots), len(self._waiting))
        left = budget = self.pacing.prompt_tokens(
            budget, num_decodes=num_decodes, num_prompts=num_prompts
        )
        left = self._plan_prompts(plan, left)
        if self._table.num_preemptions == num_preemptions:
            left = self._admit(plan, left)
        if not plan.sequences:
            return None
        plan = replace(plan, num_decodes=num_decodes, num_prompt_tokens=budget - left)
        self._speculation.extend(plan, self._config.max_num_batched_tokens, self._table.draft_room)
        return plan

    def _plan_suspect(self) -> StepPlan:
        """Plan a step of the current suspect alone; others keep their pages while there is room."""
        plan, sequence = new_plan(), self._suspects.current
        had_pages = sequence.allocation is not None
        if not had_pages or not self._table.grow(sequence):
            if had_pages and self._running:
                # Its own pages were taken: with no more room it would come here again, for ever.
                self._table.preempt(self._running[-1])
            while not self._start(plan, sequence, reserve_pages=0):
                self._table.preempt(self._running[-1])
        count = self._table.chunk(sequence, self._config.max_num_batched_tokens)
        add_row(plan, sequence, count)
        return replace(plan, num_prompt_tokens=count)

    def _plan_decodes(self, plan: StepPlan) -> None:
        running, page_size, row = self._running, self._info.page_size, 0
        self._table.compact_decodes()
        while row < len(running):
            sequence = running[row]
            allocation = sequence.allocation
            assert allocation is not None, "a running sequence without pages"
            is_decode = len(sequence.token_ids) - sequence.num_computed == 1
            if not (is_decode and sequence.awaits_token):
                has_room = sequence.num_stored < len(allocation.shortest_page_ids) * page_size
                if (has_room or self._table.go_on(sequence)) and is_decode:
                    add_row(plan, sequence, 1)
            # Another stands in its place where it had to be preempted itself.
            row += sequence.allocation is not None

    def _plan_prompts(self, plan: StepPlan, budget_tokens: int) -> int:
        for sequence in self._running:
            if budget_tokens == 0:
                break
            is_prompt = len(sequence.token_ids) - sequence.num_computed > 1
            if is_prompt and (count := self._table.chunk(sequence, budget_tokens)):
                add_row(plan, sequence, count)
                budget_tokens -= count
        return budget_tokens

    def _admit(self, plan: StepPlan, budget_tokens: int) -> int:
        """Admit requests that fit, in order of precedence; one that does not fit blocks the rest.

        A request whose next page a running sequence is computing right now waits for that page
        instead of computing it twice, and blocks no other (unless `_MAX_HELD_BACK` such wait).
        """
        free_slots = self._table.free_slots
        if budget_tokens == 0 or not free_slots:
            return budget_tokens
        self._is_blocked = False
        if not self._waiting:
            return budget_tokens
        num_looked_at = len(free_slots) + _MAX_HELD_BACK
        for sequence in list(islice(self._waiting, num_looked_at)):
            if sequence.token_ids[-1] == PENDING_TOKEN:
                # Preempted with a step under way, which is to bring its newest token.
                break
            if self._prospects.is_held_back(sequence):
                continue
            # One page for each that runs: none is admitted only to be preempted soon after.
            if self._prospects.is_blocked(sequence) or not self._start(
                plan, sequence, reserve_pages=len(self._running)
            ):
                self._prospects.note_blocked(sequence)
                self._is_blocked = True
                break
            count = self._table.chunk(sequence, budget_tokens)
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
        plan.step.moves.extend(allocation.moves)
        if not sequence.is_started:
            sequence.is_started = True
            misses, num_tokens = allocation.misses, len(sequence.token_ids)
            self._lookups.add(num_tokens, misses, self.pacing.token_s)
            plan.started.append((sequence.request_id, misses))
        return True

    # ---- results ---------------------------------------------------------------------------------

    def apply(self, plan: StepPlan, output: StepOutput, elapsed_s: float = 0.0) -> StepResult:
        """Process the output of a plan's step, and its time (0: not measured)."""
        self._num_steps += 1
        self._num_under_way -= 1
        self._prompt_tokens_computed += plan.num_prompt_tokens
        if elapsed_s and not self._suspects:
            self.pacing.observe(
                elapsed_s,
                num_decodes=plan.num_decodes,
                num_prompt_tokens=plan.num_prompt_tokens,
                num_draft_tokens=plan.num_draft_tokens,
                num_guessed_tokens=plan.num_guessed_tokens,
            )
        step, logprobs, outcome = plan.step, output.logprobs, StepResult()
        landed = self._land(plan, output, outcome)
        samples = zip(step.sample_rows, step.sample_positions, landed, strict=True)
        for index, (row, position, token_ids) in enumerate(samples):
            if plan.is_void(row):
                continue
            sequence = plan.sequences[row]
            if sequence.params.max_tokens == 0 and index not in output.not_finite:
                reason = sequence.stop_reason(position - 1)
                self._stop(sequence, reason or FinishReason.LENGTH, outcome)
            elif token_ids:
                if row not in plan.drafts:
                    [sequence.token_ids[position]] = token_ids
                scores = logprobs[index] if logprobs else None
                outcome.add_tokens(sequence.request_id, token_ids, scores)
                self._speculation.observe(sequence, token_ids)
                if reason := sequence.stop_reason(position + len(token_ids) - 1):
                    self._stop(sequence, reason, outcome)
            else:
                self._go_without(sequence, position, output, index, outcome)
        if self._suspects:
            self._judge(plan, outcome)
        return outcome

    def _land(self, plan: StepPlan, output: StepOutput, outcome: StepResult) -> list[list[int]]:
        """Enter a step's tokens, keys and scores; return the tokens up to the sequences' ends."""
        landed = output.token_ids
        if plan.drafts:
            landed = land_drafts(plan, output.token_ids, self._waiting)
            self._speculation.verify(plan, output, landed, outcome)
        advance(plan, landed, self._cache)
        note_scores(plan, output, outcome)
        return landed

    def _stop(self, sequence: Sequence, reason: FinishReason, outcome: StepResult) -> None:
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
        self._table.take_back(sequence, position)
        if index in output.failures:
            self._finish(sequence, FinishReason.ERROR)
            outcome.failed.append((sequence.request_id, output.failures[index]))
        else:
            self._num_late_rows += 1

    # ---- faults ----------------------------------------------------------------------------------

    def fail(self, plan: StepPlan, why: str) -> None:
        """Take back a step that raised: its sequences run again, alone, one after another.

        A sequence that fails alone is ended with `why` in an outcome, once a probe has shown that
        the model still computes. Raises `ModelFaultError` if the probe itself failed.
        """
        self._num_under_way -= 1
        for row, sequence in enumerate(plan.sequences):
            if not plan.is_void(row):
                end = plan.step.positions[row] + plan.step.counts[row]
                self._suspect(sequence, end, why)

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
        """Clear or convict a suspect after a step that did not fail."""
        sequence = plan.sequences[0]
        if sequence is self._suspects.probe:
            outcome.finished.clear()
            accused, why = self._suspects.convict()
            self._table.finish(accused, FinishReason.ERROR)
            self._speculation.forget(accused)
            outcome.failed.append((accused.request_id, why))
        elif not plan.is_void(0):
            self._suspects.clear(sequence)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._table.finish(sequence, reason)
        self._speculation.forget(sequence)
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
            prefix_queries_tokens_total=self._lookups.num_queried_tokens,
            prefix_hits_tokens_total=self._lookups.num_reused_tokens,
            prompt_tokens_computed_total=self._prompt_tokens_computed,
            preemptions_total=self._table.num_preemptions,
            late_rows_total=self._num_late_rows,
            faulty_rows_total=self._num_faulty_rows,
            steps_total=self._num_steps,
            speculation=self._speculation.stats(),
            misses=self._lookups.stats(),
        )

    def check(self) -> None:
        """Assert every invariant, the cache's too."""
        self._cache.check()
        self.pacing.check()
        self._suspects.check()
        self._table.check()
        self._prospects.check(len(self._running))
