"""Enters the results of a step into its sequences: tokens behind drafts, completed keys, scores.

Knows nothing of how steps are planned, nor of why a sequence ends.
"""

from __future__ import annotations

from cache.kv_cache import KVCache
from model.interface import StepOutput
from scheduler.messages import StepResult
from scheduler.plan import StepPlan
from scheduler.queue import WaitingQueue
from scheduler.sequence import State


def land_drafts(
    plan: StepPlan, token_ids: list[list[int]], waiting: WaitingQueue
) -> list[list[int]]:
    """Enter the tokens of the rows with drafts, which are several.

    Return the tokens of all rows without those behind the end of a sequence.
    """
    landed, positions = list(token_ids), plan.step.sample_positions
    for row in plan.drafts:
        if plan.is_void(row):
            continue
        # A row with drafts is a decode: its sample has its number.
        sequence = plan.sequences[row]
        sequence.is_drafted = False
        landed[row] = tokens = sequence.land(positions[row], token_ids[row])
        num_more = max(0, len(tokens) - 1)
        if sequence.state is State.WAITING:
            waiting.count_tokens(num_more)
        else:
            sequence.num_computed += num_more
    return landed


def advance(plan: StepPlan, token_ids: list[list[int]], cache: KVCache) -> None:
    """Count the keys that a step completed, and commit and drop pages accordingly.

    The keys of drafts that were not accepted do not count: the next step writes over them.
    """
    step, page_size = plan.step, cache.bounds.page_size
    # A row without a token computes its last one again, which samples the next.
    again = set[int]()
    if not all(token_ids):
        sampled = zip(step.sample_rows, token_ids, strict=True)
        again = {row for row, tokens in sampled if not tokens}
    rows = zip(plan.sequences, step.counts, step.page_ids, strict=True)
    for row, (sequence, count, page_ids) in enumerate(rows):
        allocation = sequence.allocation
        # Meanwhile it may have ended or been preempted, or even have come back.
        if allocation is None or allocation.page_ids is not page_ids:
            continue
        before = sequence.num_completed
        num_new = len(token_ids[row]) if row in plan.drafts else count - (row in again)
        completed = sequence.num_completed = before + num_new
        if completed // page_size != before // page_size:
            cache.commit(allocation, sequence.token_ids, completed)
        if allocation.drops_pages:
            # No query comes before this one, not even if the last token is computed again.
            cache.drop_unread(allocation, completed)


def note_scores(plan: StepPlan, output: StepOutput, outcome: StepResult) -> None:
    """Report the scores of prompts that are new."""
    for span, scores in zip(plan.step.scored, output.prompt_logprobs, strict=True):
        if plan.is_void(span.row):
            continue
        sequence = plan.sequences[span.row]
        # Preempted with a step under way and back, it may have two steps that score the same.
        num_known = sequence.num_scored - plan.step.positions[span.row] - span.offset
        assert num_known >= 0, "a prompt's scores have a gap"
        if new := scores[num_known:]:
            sequence.num_scored += len(new)
            outcome.prompt_logprobs.append((sequence.request_id, new))
