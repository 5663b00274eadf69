"""Drafts of the steps: which rows have them, how long they are, and which were accepted.

Knows nothing of how drafts are made (`scheduler/drafters/`) or verified (`SampleSpan`), nor of
clocks.
"""

from __future__ import annotations

from collections.abc import Callable

from model.interface import PENDING_TOKEN
from scheduler.acceptance import Acceptance
from scheduler.draft_lengths import Offer, Step, choose_lengths
from scheduler.drafters.draft import Draft, Drafter
from scheduler.messages import StepResult
from scheduler.pacing import Pacing
from scheduler.plan import StepPlan, add_drafts
from scheduler.sequence import Sequence
from scheduler.stats import DraftCounts, SpeculationStats

#: Drafts that do not seem to pay are tried in this share of the time, at most.
_TRIAL_SHARE = 0.02
#: Tries that may be saved up.
_MAX_TRIALS = 4
#: The first tokens, whose price is not known.
_FIRST_TOKENS = 2
#: Where not even a certain token would pay, the price is measured again after so many steps.
_REPRICE_STEPS = 256
_UNLIMITED = 1 << 30


class Speculation:
    """Adds drafts to plans, and counts the accepted tokens. Drafts change no token."""

    def __init__(self, drafter: Drafter | None, max_tokens: int, pacing: Pacing) -> None:
        """`max_tokens`: of one draft."""
        self._drafter = drafter
        self._max_tokens = max_tokens
        self._pacing = pacing
        #: Of the running sequences that had a draft.
        self._acceptance: dict[Sequence, Acceptance] = {}
        #: Time that tries may take.
        self._trial_s = 0.0
        #: Steps in a row in which no draft at all would pay.
        self._num_unpaid_steps = 0
        self._stats = DraftCounts()

    @property
    def is_on(self) -> bool:
        """Whether there is a drafter."""
        return self._drafter is not None

    def extend(
        self, plan: StepPlan, max_step_tokens: int, room_for: Callable[[Sequence, int], int]
    ) -> None:
        """Add drafts to the decodes of a plan that is complete but for them, and has no prompts.

        They take the rest of the budget, `max_step_tokens` in all. `room_for` makes room for a
        draft of a sequence, and returns for how many of its tokens there is some.
        """
        # A longer step would delay the first tokens of its prompts.
        if self._drafter is None or plan.num_prompt_tokens or self._pacing.has_to_time_decodes:
            return
        budget_tokens = max_step_tokens - plan.num_tokens
        if budget_tokens <= 0:
            return
        step = self._pacing.step(plan.num_decodes)
        if step is not None:
            budget_tokens = min(budget_tokens, self._max_step_tokens(step))
        offers = dict[int, Draft]()
        for row in range(plan.num_decodes if budget_tokens else 0):
            sequence = plan.sequences[row]
            if self._may_draft(sequence, step):
                draft = self._propose(self._drafter, sequence, budget_tokens)
                if draft is not None:
                    offers[row] = draft
        if offers:
            lengths = self._lengths(plan, offers, budget_tokens, step)
            rooms = {row: room_for(plan.sequences[row], n) for row, n in lengths.items() if n}
            add_drafts(plan, {row: offers[row].beginning(n) for row, n in rooms.items() if n})

    def _max_step_tokens(self, step: Step) -> int:
        """Return how many tokens of drafts a step may have, whatever their acceptance."""
        saved_s = self._trial_s + _TRIAL_SHARE * step.time_s
        self._trial_s = min(saved_s, _MAX_TRIALS * step.draft_token_s)
        if step.pays(1.0):
            self._num_unpaid_steps = 0
            is_timed = self._pacing.draft_token_s is not None
            return _UNLIMITED if is_timed else _FIRST_TOKENS
        self._num_unpaid_steps += 1
        if self._num_unpaid_steps == _REPRICE_STEPS:
            # The price may have been that of one slow step.
            self._pacing.forget_drafts()
        return 0

    def _may_draft(self, sequence: Sequence, step: Step | None) -> bool:
        """Return whether the best of drafts would pay for a sequence, or is to be tried."""
        # The token of the step before must be known; that of this one is pending always.
        if not sequence.request.may_speculate or sequence.token_ids[-2] == PENDING_TOKEN:
            return False
        found = self._acceptance.get(sequence)
        if found is None or step is None or step.pays(found.of(1.0)):
            return True
        found.wait()
        return self._may_try(found, step)

    def _may_try(self, acceptance: Acceptance, step: Step) -> bool:
        return acceptance.is_trial_due and self._trial_s >= step.draft_token_s

    def _propose(self, drafter: Drafter, sequence: Sequence, budget_tokens: int) -> Draft | None:
        """Return a draft without tokens that could not be of use."""
        token_ids = sequence.token_ids
        # The last token of all is drawn behind the drafts.
        room_tokens = sequence.max_len_tokens - len(token_ids)
        max_tokens = min(self._max_tokens, budget_tokens, room_tokens)
        if max_tokens <= 0:
            return None
        # A drafter reads known tokens alone.
        pending = token_ids.pop()
        draft = drafter.propose(sequence, max_tokens)
        token_ids.append(pending)
        return draft and draft.usable(max_tokens, sequence.stop_ids)

    def _lengths(
        self, plan: StepPlan, offers: dict[int, Draft], budget_tokens: int, step: Step | None
    ) -> dict[int, int]:
        """Return by row how many tokens of its draft to verify."""
        if step is None:
            # Nothing was timed: each row has its share.
            share = max(1, budget_tokens // len(offers))
            rows = list(offers)[:budget_tokens]
            return {row: min(share, len(offers[row].token_ids)) for row in rows}
        found = {row: self._acceptance_of(plan.sequences[row]) for row in offers}
        chosen = choose_lengths(
            [
                Offer(len(draft.token_ids), found[row].of(draft.probability))
                for row, draft in offers.items()
            ],
            budget_tokens,
            step,
        )
        lengths = dict(zip(offers, chosen, strict=True))
        budget_tokens -= sum(chosen)
        for row in [row for row, length in lengths.items() if length == 0]:
            if budget_tokens and self._may_try(found[row], step):
                lengths[row] = 1
                budget_tokens -= 1
                self._trial_s -= step.draft_token_s
            else:
                found[row].wait()
        return lengths

    def _acceptance_of(self, sequence: Sequence) -> Acceptance:
        return self._acceptance.setdefault(sequence, Acceptance())

    def verify(
        self,
        plan: StepPlan,
        token_ids: list[list[int]],
        landed: list[list[int]],
        outcome: StepResult,
    ) -> None:
        """Count the accepted tokens of the drafts. `landed`: `token_ids` up to a sequence's end."""
        for row, draft in plan.drafts.items():
            drawn = token_ids[row]
            # Without a token, for want of a mask, nothing was verified.
            if plan.is_void(row) or not drawn:
                continue
            sequence, offered = plan.sequences[row], draft.token_ids
            num_accepted = num_equal(drawn, offered)
            # Where the span ended early, the token behind the last was not drawn.
            num_tried = min(len(drawn), len(offered))
            self._acceptance_of(sequence).observe(num_tried, num_accepted, draft.probability)
            num_used = min(num_accepted, len(landed[row]))
            self._stats.add(draft.drafter, len(offered), num_used)
            outcome.drafts.append((sequence.request_id, len(offered), num_used))

    def observe(self, sequence: Sequence, token_ids: list[int]) -> None:
        """Pass the newest tokens of a sequence to the drafter."""
        if self._drafter is not None:
            self._drafter.observe(sequence, token_ids)

    def forget(self, sequence: Sequence) -> None:
        """Drop all that is kept for a sequence that has finished."""
        self._acceptance.pop(sequence, None)
        if self._drafter is not None:
            self._drafter.forget(sequence)

    def stats(self) -> SpeculationStats:
        """Return a snapshot."""
        return self._stats.snapshot()


def num_equal(token_ids: list[int], others: list[int]) -> int:
    """Return how many tokens both lists begin with."""
    pairs = enumerate(zip(token_ids, others, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(token_ids), len(others)))
