"""What to compute next: requests and results in, plans and outcomes out.

Knows nothing of time, tensors, text, processes or HTTP. The same inputs give the same plans: no
clock, no chance, no sets where order matters.

One token budget a step, no phases (as in vLLM v1): sequences that lack one token (decodes) come
first, chunks of prompts fill what is left, newcomers come last.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass
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
from scheduler.messages import FinishReason, Rejected, RejectKind, Submit
from scheduler.pacing import Pacing
from scheduler.plan import StepOutcome, StepPlan, add_row, new_plan
from scheduler.queue import WaitingQueue
from scheduler.refusal import Room, displaced, place_for, why_never
from scheduler.sequence import Sequence, State

#: Those that wait for a page under computation and are looked at in one step all the same: each
#: look is a search as long as its prefix, and a thousand of them would stall those who decode.
_MOST_HELD_BACK = 32


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """One moment. Counters (`*_total`) only grow."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    lowest_waiting_priority: int
    prefix_queries_tokens_total: int
    prefix_hits_tokens_total: int
    prompt_tokens_computed_total: int
    preemptions_total: int
    #: Rows that got no token, since what their grammar allows was not known in time.
    late_rows_total: int
    steps_total: int


class Scheduler:
    """Decides, for one cache and one model, what each step computes."""

    def __init__(
        self,
        cache: KVCache,
        config: SchedulerSection,
        info: ModelInfo,
    ) -> None:
        self._cache = cache
        self._config = config
        self._page_size = info.page_size
        # The newest token of a sequence needs no place: its keys are never read.
        self._max_model_len = min(info.max_model_len, info.num_pages * info.page_size + 1)
        self._eos_token_ids = info.eos_token_ids
        self._pacing = Pacing(config.max_decode_slowdown)
        self._waiting = WaitingQueue()
        #: In order of precedence: the last is the first to be preempted.
        self._running: list[Sequence] = []
        self._requests: dict[int, Sequence] = {}
        self._free_slots = deque(range(config.max_num_seqs))
        self._num_arrivals = 0
        self._prefix_queries_tokens = 0
        self._prefix_hits_tokens = 0
        self._prompt_tokens_computed = 0
        self._num_preemptions = 0
        self._num_late_rows = 0
        self._num_steps = 0

    # ---- requests in and out ---------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a plan would have something in it, now or once others have gone on."""
        return bool(self._requests)

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
        self._requests[submit.request_id] = sequence
        self._waiting.append(sequence)
        return [displaced(leaving) for leaving in found]

    def _place_for(self, submit: Submit) -> Rejected | list[Sequence]:
        if submit.request_id in self._requests:
            message = f"request id {submit.request_id} is in use"
            return Rejected(submit.request_id, RejectKind.INVALID, message, "request_id")
        free_pages = self._cache.available_pages - len(self._running)
        room = Room(len(self._free_slots), free_pages, self._page_size)
        never = why_never(submit, self._max_model_len)
        return never or place_for(submit, self._waiting, room, self._config)

    def cancel(self, request_id: int) -> None:
        """Forget a request and give its pages back, at once. Unknown ids are fine."""
        sequence = self._requests.get(request_id)
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
        plan = new_plan()
        num_preemptions = self._num_preemptions
        self._plan_decodes(plan)
        num_decodes = len(plan.sequences)
        budget = self._config.max_num_batched_tokens - num_decodes
        left = budget = self._pacing.prompt_tokens(budget, num_decodes=num_decodes)
        left = self._plan_prompts(plan, left)
        if self._num_preemptions == num_preemptions:
            left = self._admit(plan, left)
        if not plan.sequences:
            return None
        return StepPlan(plan.step, plan.sequences, plan.started, num_decodes, budget - left)

    def _plan_decodes(self, plan: StepPlan) -> None:
        running, page_size = self._running, self._page_size
        row = 0
        while row < len(running):
            sequence = running[row]
            num_tokens = len(sequence.token_ids)
            if num_tokens - sequence.num_computed == 1 and not sequence.awaits_token:
                allocation = sequence.allocation
                assert allocation is not None, "a running sequence without pages"
                if num_tokens > len(allocation.page_ids) * page_size and not self._grow(sequence):
                    continue
                add_row(plan, sequence, 1)
            row += 1

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for the sequence's newest token, at the cost of those of least precedence."""
        assert sequence.allocation is not None, "a running sequence without pages"
        while not self._cache.grow(sequence.allocation, len(sequence.token_ids)):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

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
        if budget_tokens == 0 or not self._free_slots or not self._waiting:
            return budget_tokens
        num_looked_at = len(self._free_slots) + _MOST_HELD_BACK
        for sequence in list(islice(self._waiting, num_looked_at)):
            if sequence.token_ids[-1] == PENDING_TOKEN:
                # Preempted with a step under way, which is to bring its newest token.
                break
            most_cached = sequence.most_cached_tokens
            if (
                most_cached is None
                and self._cache.match(sequence.token_ids, sequence.namespace).in_flight
            ):
                continue
            # One page for each that runs: nobody is let in only to be preempted soon after.
            allocation = self._cache.admit(
                sequence.token_ids, sequence.namespace, len(self._running), most_cached
            )
            if allocation is None:
                break
            sequence.allocation = allocation
            self._start(plan, sequence, allocation.num_cached_tokens, allocation.miss_reason)
            plan.step.copies.extend(
                PageCopy(copy.source, copy.target, copy.num_tokens) for copy in allocation.copies
            )
            count = min(len(sequence.token_ids) - sequence.num_computed, budget_tokens)
            add_row(plan, sequence, count)
            budget_tokens -= count
            if budget_tokens == 0 or not self._free_slots:
                break
        return budget_tokens

    def _start(self, plan: StepPlan, sequence: Sequence, num_cached: int, why: str) -> None:
        sequence.move(State.RUNNING, f"admitted with {num_cached} cached tokens")
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=lambda running: running.precedence)
        sequence.num_computed = sequence.num_landed = num_cached
        sequence.slot = self._free_slots.popleft()
        plan.step.started.append(sequence.slot_start())
        if not sequence.is_started:
            sequence.is_started = True
            self._prefix_queries_tokens += len(sequence.token_ids)
            self._prefix_hits_tokens += num_cached
            plan.started.append((sequence.request_id, num_cached, why))

    # ---- results ---------------------------------------------------------------------------------

    def apply(self, plan: StepPlan, output: StepOutput, elapsed_s: float = 0.0) -> StepOutcome:
        """Take in what a plan's step sampled, and how long it took (0: not measured)."""
        self._num_steps += 1
        self._prompt_tokens_computed += plan.num_prompt_tokens
        if elapsed_s:
            self._pacing.observe(
                elapsed_s,
                num_decodes=plan.num_decodes,
                num_prompt_tokens=plan.num_prompt_tokens,
            )
        self._advance(plan, output.token_ids)
        outcome = StepOutcome([], [], [], [], [], [])
        self._note_scores(plan, output, outcome)
        step, logprobs = plan.step, output.logprobs
        for index, row in enumerate(step.sample_rows):
            sequence = plan.sequences[row]
            if sequence.state is State.FINISHED:
                continue
            position = step.starts[row] + step.counts[row]
            token_id = output.token_ids[index]
            if sequence.params.max_tokens == 0:
                position -= 1
            elif token_id == NO_TOKEN:
                self._take_back(sequence, position)
                if index in output.failures:
                    self._finish(sequence, FinishReason.ERROR)
                    outcome.failed.append((sequence.request_id, output.failures[index]))
                else:
                    self._num_late_rows += 1
                continue
            else:
                sequence.token_ids[position] = token_id
                outcome.request_ids.append(sequence.request_id)
                outcome.token_ids.append(token_id)
                if logprobs:
                    outcome.logprobs.append(logprobs[index])
            reason = sequence.stop_reason(position)
            if reason is not None:
                self._finish(sequence, reason)
                outcome.finished.append((sequence.request_id, reason))
        return outcome

    def _note_scores(self, plan: StepPlan, output: StepOutput, outcome: StepOutcome) -> None:
        for span, scores in zip(plan.step.scored, output.prompt_logprobs, strict=True):
            sequence = plan.sequences[span.row]
            if sequence.state is State.FINISHED:
                continue
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

    def fail(self, plan: StepPlan) -> list[int]:
        """End every request of a step that raised; the ids of those that ended by it."""
        failed = [s for s in plan.sequences if s.state is not State.FINISHED]
        for sequence in failed:
            self._finish(sequence, FinishReason.ERROR)
        return [sequence.request_id for sequence in failed]

    def _preempt(self, sequence: Sequence) -> None:
        """Take the pages back; what they hold stays in the tree, so coming back is nearly free."""
        self._num_preemptions += 1
        self._leave(sequence, State.WAITING, "preempted")
        self._waiting.append_first(sequence)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.state is State.RUNNING:
            self._leave(sequence, State.FINISHED, reason)
        else:
            self._waiting.remove(sequence)
            sequence.move(State.FINISHED, reason)
        sequence.finish_reason = reason
        del self._requests[sequence.request_id]

    def _leave(self, sequence: Sequence, to: State, why: str) -> None:
        assert sequence.allocation is not None, "a running sequence without pages"
        sequence.move(to, why)
        # A step under way may still write to these pages: before anything that is planned from now
        # on, so whoever gets them next loses nothing. What it writes is not counted on.
        self._cache.free(sequence.allocation, sequence.token_ids, sequence.num_landed)
        sequence.allocation = None
        sequence.num_computed = sequence.num_landed = 0
        self._running.remove(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

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
            preemptions_total=self._num_preemptions,
            late_rows_total=self._num_late_rows,
            steps_total=self._num_steps,
        )

    def check(self) -> None:
        """Assert every invariant, the cache's too."""
        self._cache.check()
        self._waiting.check()
        self._pacing.check()
        running, waiting = self._running, list(self._waiting)
        assert running == sorted(running, key=lambda s: s.precedence), "running is out of order"
        assert all(s.state is State.RUNNING for s in running), "running in name only"
        assert all(s.state is State.WAITING for s in waiting), "waiting in name only"
        assert all(s.allocation is None for s in waiting), "a waiting sequence holds pages"
        assert all(s.num_computed == 0 for s in waiting), "a waiting sequence has computed tokens"
        slots = sorted([*self._free_slots, *(s.slot for s in running)])
        assert slots == list(range(self._config.max_num_seqs)), "a slot is lost or doubly used"
        live = sorted(s.request_id for s in [*running, *waiting])
        assert live == sorted(self._requests), "a request is neither running nor waiting"
        for sequence in running:
            assert sequence.allocation is not None, "a running sequence without pages"
            held = len(sequence.allocation.page_ids) * self._page_size
            assert sequence.num_computed <= held, "computed more than its pages hold"
            cached = sequence.allocation.num_cached_tokens
            assert cached <= sequence.num_landed, "shared pages would be written again"
            assert sequence.num_landed <= sequence.num_computed, "more came back than was sent"
            assert sequence.num_computed < len(sequence.token_ids), "nothing left to compute"
        cache = self._cache.stats()
        assert running or cache.pages_private == cache.pages_leased == 0, "nothing runs, pages held"
