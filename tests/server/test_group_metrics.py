"""Two groups of pages in the metrics: pages of different sizes, and the fuller group's share."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cache.stats import CacheStats
from cache.view import View
from model.fake import FakeRunner
from model.interface import WindowedPages
from scheduler.stats import EngineStats, SchedulerStats
from server.exposition import Page, gauges
from server.kv_sizes import full_length_requests, kv_bytes


def test_bytes_are_those_of_both_groups() -> None:
    windowed = CacheStats(10, 2, 3, 5, 1)
    cache = CacheStats(40, 10, 13, 17, 4, windowed=windowed)
    pages = WindowedPages(10, kv_bytes_per_token=3, view=View(window=8))
    info = replace(FakeRunner(num_pages=30, page_size=4).info, windowed=pages)
    found = {
        (sample.name, sample.labels.get("state")): sample.value
        for family in gauges(Page("m"), EngineStats(SchedulerStats(), cache), info)
        for sample in family.samples
    }
    # A token takes four bytes, three of them in windowed layers.
    assert found["octavo_kv_cache_bytes", "free"] == 8 * 4 * 1 + 2 * 4 * 3
    assert found["octavo_kv_cache_bytes", "cached"] == 12 * 4 * 1 + 5 * 4 * 3
    assert found["octavo_kv_cache_pages", "private"] == 13
    assert found["octavo_kv_cache_usage_perc", None] == pytest.approx(max(4 / 10, 13 / 30))
    assert found["octavo_kv_tokens_capacity", None] == 30 * 4
    assert kv_bytes(info) == 30 * 4 * 1 + 10 * 4 * 3
    assert full_length_requests(info) == 0
