"""The cache that suits a model: one group of pages, or two.

Knows nothing of steps.
"""

from __future__ import annotations

from cache.groups import GroupedCache
from cache.kv_cache import KVCache
from cache.policy import policy_of
from configs.schema import SchedulerSection
from model.interface import ModelInfo


def build_cache(info: ModelInfo, config: SchedulerSection) -> KVCache:
    """Build the cache of a model's pages."""
    chunk_tokens, page_size = config.max_num_batched_tokens, info.page_size
    can_share_heads = info.smallest_reusable_prefix_tokens == 1
    policy = policy_of(config.cache_policy, info.num_pages, page_size)
    if info.windowed is None:
        return KVCache(
            info.num_pages,
            page_size,
            policy,
            view=info.view,
            chunk_tokens=chunk_tokens,
            can_share_heads=can_share_heads,
            pin_share=config.cache_pin_share,
        )
    return GroupedCache(
        info.num_pages,
        info.windowed.num_pages,
        page_size,
        policy,
        windowed_view=info.windowed.view,
        chunk_tokens=chunk_tokens,
        can_share_heads=can_share_heads,
        pin_share=config.cache_pin_share,
    )
