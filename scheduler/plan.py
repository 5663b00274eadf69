"""One step: what it is to compute, for whom, and what came of it.

Knows nothing of why a sequence is in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.interface import (
    PENDING_TOKEN,
    RowSpan,
    SampleSpan,
    ScoredSpan,
    StepInput,
    TokenLogprobs,
)
from scheduler.messages import FinishReason
from scheduler.sequence import Sequence

#: Makes a named tuple in half the time of its own constructor, for each row of each step.
_new = tuple.__new__


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: row i of `step` belongs to `sequences[i]`."""

    step: StepInput
    sequences: list[Sequence]
    #: Each `[rows]`: the sequence's rollbacks when the step was planned.
    rollbacks: list[int]
    #: Those that left the queue for the first time: (request id, cached tokens, miss reason).
    started: list[tuple[int, int, str]]
    num_decodes: int
    num_prompt_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens the step computes."""
        return len(self.step.token_ids)

    def is_void(self, row: int) -> bool:
        """Whether the row's sequence has ended or was rolled back since the step was planned."""
        sequence = self.sequences[row]
        return sequence.finish_reason is not None or sequence.num_rollbacks != self.rollbacks[row]


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step brought; columns are parallel, `logprobs` may be empty."""

    request_ids: list[int]
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    finished: list[tuple[int, FinishReason]]
    #: (request id, why): ended by an error of its own.
    failed: list[tuple[int, str]]
    #: (request id, the next tokens of its prompt).
    prompt_logprobs: list[tuple[int, tuple[TokenLogprobs, ...]]]


def new_plan() -> StepPlan:
    """Return a plan with nothing in it."""
    return StepPlan(StepInput([], [], [], [], []), [], [], [], 0, 0)


def add_row(plan: StepPlan, sequence: Sequence, count: int) -> None:
    """Let the step compute the sequence's next `count` tokens, and count on them from here on."""
    step, start, token_ids = plan.step, sequence.num_computed, sequence.token_ids
    row, end = len(step.rows), start + count
    allocation = sequence.allocation
    assert allocation is not None, "a running sequence without pages"
    if count == 1:
        step.token_ids.append(token_ids[start])
    else:
        step.token_ids.extend(token_ids[start:end])
    sequence.num_computed = end
    if end == len(token_ids):
        step.samples.append(_new(SampleSpan, (row, count - 1, 1)))
        token_ids.append(PENDING_TOKEN)
    if start < sequence.num_to_score:
        first, last = max(start, sequence.num_scored), min(end, sequence.num_to_score)
        if first < last:
            targets = token_ids[first + 1 : last + 1]
            step.scored.append(ScoredSpan(row, first - start, targets))
    step.rows.append(_new(RowSpan, (start, start, count)))
    step.slots.append(sequence.slot)
    step.page_ids.append(allocation.page_ids)
    plan.sequences.append(sequence)
    plan.rollbacks.append(sequence.num_rollbacks)
