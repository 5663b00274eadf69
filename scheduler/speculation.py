"""Drafts of the steps: which rows have them, and which of their tokens were accepted.

Knows nothing of how drafts are made (`scheduler/drafters/`), priced (`scheduler/priced_drafts.py`)
or verified (`SampleSpan`), nor of clocks.
"""

from __future__ import annotations

from collections.abc import Callable

from model.interface import PENDING_TOKEN, StepOutput
from scheduler.draft_lengths import Step
from scheduler.drafters.draft import Draft, Drafter
from scheduler.drafters.model import ModelDrafter
from scheduler.messages import StepResult
from scheduler.pacing import Pacing
from scheduler.plan import StepPlan, add_drafts
from scheduler.priced_drafts import PricedDrafts
from scheduler.sequence import Sequence
from scheduler.stats import DraftCounts, SpeculationStats


class Speculation:
    """Adds drafts to plans, and counts the accepted tokens. Drafts change no token.

    A sequence has the draft of a text where there is one that pays, else that of the draft model:
    the first costs less.
    """

    def __init__(
        self,
        drafter: Drafter | None,
        max_tokens: int,
        pacing: Pacing,
        *,
        has_draft_model: bool = False,
    ) -> None:
        """`drafter`: from texts; `max_tokens`: of one draft."""
        self._pacing = pacing
        self._kinds = list[PricedDrafts]()
        if drafter is not None:
            self._kinds.append(PricedDrafts(drafter, max_tokens, pacing.text_price))
        if has_draft_model:
            self._kinds.append(PricedDrafts(ModelDrafter(), max_tokens, pacing.model_price))
        self._stats = DraftCounts()

    @property
    def is_on(self) -> bool:
        """Whether there is a drafter."""
        return bool(self._kinds)

    def extend(
        self, plan: StepPlan, max_step_tokens: int, room_for: Callable[[Sequence, int], int]
    ) -> None:
        """Add drafts to the decodes of a plan that is complete but for them, and has no prompts.

        They take the rest of the budget, `max_step_tokens` in all. `room_for` makes room for a
        draft of a sequence, and returns for how many of its tokens there is some.
        """
        # A longer step would delay the first tokens of its prompts.
        if not self.is_on or plan.num_prompt_tokens or self._pacing.has_to_time_decodes:
            return
        drafts = self._choose(plan, max_step_tokens - plan.num_tokens)
        rooms = {row: room_for(plan.sequences[row], len(drafts[row].token_ids)) for row in drafts}
        add_drafts(plan, {row: drafts[row].beginning(n) for row, n in rooms.items() if n})

    def _choose(self, plan: StepPlan, budget_tokens: int) -> dict[int, Draft]:
        """Return the drafts to verify by row."""
        drafts, step = dict[int, Draft](), None
        rows = [row for row in range(plan.num_decodes) if _may_draft(plan.sequences[row])]
        for kind in self._kinds:
            rows = [row for row in rows if row not in drafts]
            if budget_tokens <= 0 or not rows:
                break
            chosen, step = kind.choose(plan, rows, budget_tokens, self._step(plan, kind, step))
            budget_tokens -= sum(len(draft.token_ids) for draft in chosen.values())
            drafts |= chosen
        return drafts

    def _step(self, plan: StepPlan, kind: PricedDrafts, before: Step | None) -> Step | None:
        """Estimate the step with the drafts so far, `before`, and the price of another kind."""
        step = self._pacing.step(plan.num_decodes, kind.price)
        if step is None or before is None:
            return step
        return before._replace(draft_token_s=step.draft_token_s)

    def verify(
        self, plan: StepPlan, output: StepOutput, landed: list[list[int]], outcome: StepResult
    ) -> None:
        """Count the accepted tokens of the drafts. `landed`: the tokens up to a sequence's end."""
        for row, draft in plan.drafts.items():
            drawn = output.token_ids[row]
            # Without a token, for want of a mask, nothing was verified.
            if plan.is_void(row) or not drawn:
                continue
            sequence, offered = plan.sequences[row], output.guesses.get(row, draft.token_ids)
            num_accepted = num_equal(drawn, offered)
            # Where the span ended early, the token behind the last was not drawn.
            num_tried = min(len(drawn), len(offered))
            kind = self._kinds[-1 if draft.is_guessed else 0]
            kind.verify(sequence, draft, num_tried, num_accepted)
            num_used = min(num_accepted, len(landed[row]))
            self._stats.add(draft.drafter, len(offered), num_used)
            outcome.drafts.append((sequence.request_id, len(offered), num_used))

    def observe(self, sequence: Sequence, token_ids: list[int]) -> None:
        """Pass the newest tokens of a sequence to the drafters."""
        for kind in self._kinds:
            kind.drafter.observe(sequence, token_ids)

    def forget(self, sequence: Sequence) -> None:
        """Drop all that is kept for a sequence that has finished."""
        for kind in self._kinds:
            kind.forget(sequence)

    def stats(self) -> SpeculationStats:
        """Return a snapshot."""
        return self._stats.snapshot()


def _may_draft(sequence: Sequence) -> bool:
    """Return whether a decode may have a draft at all."""
    # Queries of drafts that are not accepted would count at a compaction point.
    if sequence.selection is not None:
        return False
    # The token of the step before must be known; that of this one is pending always.
    return sequence.request.may_speculate and sequence.token_ids[-2] != PENDING_TOKEN


def num_equal(token_ids: list[int], others: list[int]) -> int:
    """Return how many tokens both lists begin with."""
    pairs = enumerate(zip(token_ids, others, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(token_ids), len(others)))
