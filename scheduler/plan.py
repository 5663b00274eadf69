"""One step: its rows and their sequences.

Knows nothing of why a sequence is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cache.misses import Misses
from model.interface import PENDING_TOKEN, SampleSpan, ScoredSpan, StepInput
from scheduler.drafters.draft import Draft
from scheduler.sequence import Sequence


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: row i of `step` belongs to `sequences[i]`."""

    step: StepInput
    sequences: list[Sequence]
    #: Each `[rows]`: the sequence's rollbacks when the step was planned.
    rollbacks: list[int]
    #: Requests that left the queue for the first time, and the tokens that they could not reuse.
    started: list[tuple[int, Misses]]
    num_decodes: int
    num_prompt_tokens: int
    #: By row.
    drafts: dict[int, Draft] = field(default_factory=dict)

    @property
    def num_draft_tokens(self) -> int:
        """Tokens of all drafts."""
        return sum(len(draft.token_ids) for draft in self.drafts.values())

    @property
    def num_guessed_tokens(self) -> int:
        """Tokens of drafts by the draft model."""
        return sum(len(one.token_ids) for one in self.drafts.values() if one.is_guessed)

    @property
    def num_tokens(self) -> int:
        """Tokens the step computes."""
        return len(self.step.token_ids)

    def is_void(self, row: int) -> bool:
        """Return whether the row's sequence ended or was rolled back since the step was planned."""
        sequence = self.sequences[row]
        return sequence.finish_reason is not None or sequence.num_rollbacks != self.rollbacks[row]


def add_drafts(plan: StepPlan, drafts: Mapping[int, Draft]) -> None:
    """Lay drafts behind the newest tokens of their rows.

    These rows are decodes, which come first in a plan and have one token each.
    """
    step, token_ids = plan.step, list[int]()
    for row in range(plan.num_decodes):
        token_ids.append(step.token_ids[row])
        if row in drafts:
            draft = drafts[row].token_ids
            token_ids += draft
            step.counts[row] += len(draft)
            step.spans[row] = SampleSpan(row, 0, len(draft) + 1)
            plan.sequences[row].is_drafted = True
    step.token_ids[: plan.num_decodes] = token_ids
    plan.drafts.update(drafts)


def new_plan() -> StepPlan:
    """Return a plan with nothing in it."""
    return StepPlan(StepInput([], [], [], [], [], []), [], [], [], 0, 0)


def add_row(plan: StepPlan, sequence: Sequence, count: int) -> None:
    """Add the sequence's next `count` tokens to the step, and count them as computed."""
    step, start, token_ids = plan.step, sequence.num_computed, sequence.token_ids
    end = start + count
    allocation = sequence.allocation
    assert allocation is not None, "a running sequence without pages"
    if count == 1:
        step.token_ids.append(token_ids[start])
    else:
        step.token_ids.extend(token_ids[start:end])
    sequence.num_computed = end
    if end == len(token_ids):
        step.sample_rows.append(len(plan.sequences))
        token_ids.append(PENDING_TOKEN)
    if start < sequence.num_to_score:
        first, last = max(start, sequence.num_scored), min(end, sequence.num_to_score)
        if first < last:
            targets = token_ids[first + 1 : last + 1]
            step.scored.append(ScoredSpan(len(plan.sequences), first - start, targets))
    if sequence.num_dropped:
        step.dropped[len(plan.sequences)] = sequence.num_dropped
    step.positions.append(start)
    step.counts.append(count)
    step.slots.append(sequence.slot)
    step.page_ids.append(allocation.page_ids)
    if allocation.windowed is not None:
        step.windowed_page_ids.append(allocation.windowed.page_ids)
    plan.sequences.append(sequence)
    plan.rollbacks.append(sequence.num_rollbacks)
