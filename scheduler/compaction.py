"""When running sequences drop keys by their scores, and the pages that they need.

Knows nothing of which keys are dropped, nor of budgets.
"""

from __future__ import annotations

from cache.bounds import Bounds
from cache.kv_cache import KVCache
from scheduler.messages import Submit
from scheduler.sequence import Sequence


def has_room(submit: Submit, bounds: Bounds) -> bool:
    """Return whether the pool can hold a request that drops keys by their scores, however long."""
    selection, num_prompt = submit.request.selection, len(submit.request.prompt_token_ids)
    if selection is None:
        return False
    return selection.num_pages(num_prompt, bounds.page_size) <= bounds.num_pages


def why_no_room(submit: Submit, max_len_tokens: int, bounds: Bounds) -> str:
    """Return why the pool cannot hold a request that will drop keys by their scores; empty: it can.

    `max_len_tokens`: of prompt and answer together.
    """
    selection, num_prompt = submit.request.selection, len(submit.request.prompt_token_ids)
    end = min(max_len_tokens, num_prompt + submit.request.params.max_tokens)
    if selection is None or has_room(submit, bounds) or not selection.is_reached(num_prompt, end):
        return ""
    num_pages = selection.num_pages(num_prompt, bounds.page_size)
    return (
        f"kv_policy: the {num_prompt} tokens of the prompt, and the {selection.max_keys} that are "
        f"kept behind it, need {num_pages} pages of {bounds.page_size} tokens, and there are "
        f"{bounds.num_pages}; a smaller capacity or a shorter prompt fits"
    )


def num_fixed_pages(sequence: Sequence, page_size: int) -> int:
    """Return the pages that a sequence has from its admission on; 0: as many as it needs."""
    if sequence.selection is None:
        return 0
    return sequence.selection.num_pages(sequence.num_prompt, page_size)


def compact(sequence: Sequence, cache: KVCache) -> None:
    """Give a sequence at a compaction point its new block table; others stay as they are.

    Its next row must be in the step that is being planned: others may write to its old pages in
    that step. It waits for its own step under way, whose keys are among those to choose from.
    """
    if sequence.selection is None or sequence.num_completed < sequence.num_computed:
        return
    if sequence.is_full:
        sequence.num_dropped = sequence.num_due
        assert sequence.allocation is not None, "a running sequence without pages"
        cache.detach(sequence.allocation, sequence.selection.max_keys)
