"""Drafts of one kind: which sequences have some and how long, by their price and acceptance.

Knows nothing of pages or of clocks, nor of how drafts are made.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.acceptance import Acceptance
from scheduler.draft_lengths import Offer, Step, choose_lengths
from scheduler.draft_price import DraftPrice
from scheduler.drafters.draft import Draft, Drafter
from scheduler.plan import StepPlan
from scheduler.sequence import Sequence

#: Drafts that do not seem to pay are tried in this share of the time, at most.
_TRIAL_SHARE = 0.005
#: Tries that may be saved up.
_MAX_TRIALS = 4
#: The first tokens, whose price is not known.
_FIRST_TOKENS = 2
#: Where not even a certain token would pay, the price is measured again after so many steps.
_REPRICE_STEPS = 256
_UNLIMITED = 1 << 30


class PricedDrafts:
    """Chooses the drafts of a step, from one drafter."""

    def __init__(self, drafter: Drafter, max_tokens: int, price: DraftPrice) -> None:
        """`max_tokens`: of one draft."""
        self.drafter = drafter
        self.price = price
        self._max_tokens = max_tokens
        #: Of the running sequences that had a draft.
        self._acceptance: dict[Sequence, Acceptance] = {}
        #: Time that tries may take.
        self._trial_s = 0.0
        #: Steps in a row in which no draft at all would pay.
        self._num_unpaid_steps = 0

    def choose(
        self, plan: StepPlan, rows: Iterable[int], budget_tokens: int, step: Step | None
    ) -> tuple[dict[int, Draft], Step | None]:
        """Return the drafts to verify by row, at most `budget_tokens` in all, and the step then.

        `rows` may have drafts. `step`: without them; None: nothing was timed.
        """
        if step is not None:
            budget_tokens = min(budget_tokens, self._max_step_tokens(step))
        offers = dict[int, Draft]()
        for row in rows if budget_tokens else ():
            sequence = plan.sequences[row]
            if self._may_draft(sequence, step):
                draft = self._propose(sequence, budget_tokens)
                if draft is not None:
                    offers[row] = draft
        if not offers:
            return {}, step
        lengths, step = self._lengths(plan, offers, budget_tokens, step)
        return {row: offers[row].beginning(n) for row, n in lengths.items() if n}, step

    def _max_step_tokens(self, step: Step) -> int:
        """Return how many tokens of drafts a step may have, whatever their acceptance."""
        saved_s = self._trial_s + _TRIAL_SHARE * step.time_s
        self._trial_s = min(saved_s, _MAX_TRIALS * step.draft_token_s)
        if step.pays(1.0):
            self._num_unpaid_steps = 0
            return _UNLIMITED if self.price.token_s is not None else _FIRST_TOKENS
        self._num_unpaid_steps += 1
        if self._num_unpaid_steps == _REPRICE_STEPS:
            # The price may have been that of one slow step.
            self.price.forget()
        return 0

    def _may_draft(self, sequence: Sequence, step: Step | None) -> bool:
        """Return whether the best of drafts would pay for a sequence, or is to be tried."""
        found = self._acceptance.get(sequence)
        if found is None or step is None or step.pays(found.of(1.0)):
            return True
        found.wait()
        return self._may_try(found, step)

    def _may_try(self, acceptance: Acceptance, step: Step) -> bool:
        return acceptance.is_trial_due and self._trial_s >= step.draft_token_s

    def _propose(self, sequence: Sequence, budget_tokens: int) -> Draft | None:
        """Return a draft without tokens that could not be of use."""
        token_ids = sequence.token_ids
        # The last token of all is drawn behind the drafts.
        room_tokens = sequence.max_len_tokens - len(token_ids)
        max_tokens = min(self._max_tokens, budget_tokens, room_tokens)
        if max_tokens <= 0:
            return None
        # A drafter reads known tokens alone.
        pending = token_ids.pop()
        draft = self.drafter.propose(sequence, max_tokens)
        token_ids.append(pending)
        return draft and draft.usable(max_tokens, sequence.stop_ids)

    def _lengths(
        self, plan: StepPlan, offers: dict[int, Draft], budget_tokens: int, step: Step | None
    ) -> tuple[dict[int, int], Step | None]:
        """Return by row how many tokens of its draft to verify, and the step with them."""
        if step is None:
            # Nothing was timed: each row has its share.
            share = max(1, budget_tokens // len(offers))
            rows = list(offers)[:budget_tokens]
            return {row: min(share, len(offers[row].token_ids)) for row in rows}, None
        found = {row: self._acceptance_of(plan.sequences[row]) for row in offers}
        chosen, step = choose_lengths(
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
        return lengths, step

    def _acceptance_of(self, sequence: Sequence) -> Acceptance:
        return self._acceptance.setdefault(sequence, Acceptance())

    def verify(self, sequence: Sequence, draft: Draft, num_tried: int, num_accepted: int) -> None:
        """Learn from a draft; see `Acceptance.observe`."""
        self._acceptance_of(sequence).observe(num_tried, num_accepted, draft.probability)

    def forget(self, sequence: Sequence) -> None:
        """Drop all that is kept for a sequence that has finished."""
        self._acceptance.pop(sequence, None)
        self.drafter.forget(sequence)
