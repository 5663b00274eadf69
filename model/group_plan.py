"""The two groups of pages of a model with windowed layers beside others: their sizes, if any.

Knows nothing of how the bytes are divided (`model/kv/group_split.py`).
"""

from __future__ import annotations

from cache.view import View
from configs.schema import OctavoConfig
from model.attention.groups import layer_groups
from model.attention.interface import AttentionSpec
from model.interface import WindowedPages
from model.kv.group_split import GroupSizes
from model.kv.memory_plan import PoolPlan


def group_sizes(
    config: OctavoConfig,
    spec: AttentionSpec,
    page_size: int,
    max_len_tokens: int,
    draft_page_bytes: int = 0,
) -> GroupSizes | None:
    """Return the needs of the two groups of pages, None where one group is enough.

    That is so where all layers have a window, or none, or where no sequence is longer than it.
    `draft_page_bytes`: of a draft model, whose layers have no window.
    """
    groups = layer_groups(spec)
    if not groups.full or not groups.windowed:
        return None
    windowed = spec.of_layers(groups.windowed)
    widest = windowed.widest_window
    if widest is None or widest >= max_len_tokens:
        return None
    full_bytes = spec.of_layers(groups.full).layout(page_size).bytes_per_page
    return GroupSizes(
        full_bytes=full_bytes + draft_page_bytes,
        windowed_bytes=windowed.layout(page_size).bytes_per_page,
        view=View(window=widest),
        page_size=page_size,
        chunk_tokens=config.scheduler.max_num_batched_tokens,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_len_tokens=max_len_tokens,
    )


def windowed_pages(plan: PoolPlan) -> WindowedPages | None:
    """Describe the windowed layers' own pages, if a plan has them."""
    if plan.windowed is None:
        return None
    bytes_per_token = plan.windowed.bytes_per_page // plan.page_size
    return WindowedPages(plan.windowed.num_pages, bytes_per_token, plan.windowed.view)


def group_note(spec: AttentionSpec, plan: PoolPlan) -> str:
    """Return a note on the two groups of pages; empty where there is one."""
    if plan.windowed is None:
        return ""
    groups = layer_groups(spec)
    return (
        f"{len(groups.full)} layers read all keys and have {plan.num_pages} pages; "
        f"{len(groups.windowed)} layers read {plan.windowed.view.window} tokens and have "
        f"{plan.windowed.num_pages} pages of their own"
    )
