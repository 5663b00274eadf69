from __future__ import annotations

from dataclasses import replace

import pytest

from cache.view import View
from model.kv.group_split import GroupSizes
from model.kv.memory_plan import MemoryPlanError, plan_pool

#: Like Gemma 3: five windowed layers to one that reads all keys.
GEMMA = GroupSizes(
    full_bytes=4 * 2 * 4 * 256 * 2 * 16,
    windowed_bytes=20 * 2 * 4 * 256 * 2 * 16,
    view=View(window=1024),
    page_size=16,
    chunk_tokens=512,
    max_num_seqs=4,
    max_len_tokens=8192,
)
LAYER_PAGE = GEMMA.full_bytes + GEMMA.windowed_bytes


def used(sizes: GroupSizes, pages: tuple[int, int]) -> int:
    return pages[0] * sizes.full_bytes + pages[1] * sizes.windowed_bytes


def test_a_sequence_of_gemma_takes_less_than_a_third_of_the_bytes() -> None:
    num_pages = 8192 // 16
    num_read_pages = GEMMA.view.num_pages(16)
    assert num_read_pages == 65
    ratio = num_pages * LAYER_PAGE / used(GEMMA, (num_pages, num_read_pages))
    # By tokens, without the page at the border of the window: 8192 / (8192 / 6 + 1024 * 5 / 6).
    by_tokens = 8192 / (8192 / 6 + 1024 * 5 / 6)
    assert by_tokens == pytest.approx(3.69, abs=0.01)
    assert ratio == pytest.approx(3.67, abs=0.005)


def test_both_groups_run_out_together_for_sequences_of_equal_length() -> None:
    """In turn: shorter than the window, longer, and more of them than may run."""
    assert GEMMA.split(100 * LAYER_PAGE + 5, None) == (100, 100)
    windows, chunk = 4 * 66, 512 // 16
    memory = used(GEMMA, (1000, windows + chunk))
    assert GEMMA.split(memory, None) == (1000, windows + chunk)
    assert GEMMA.split(GEMMA.wanted_bytes(), None) == (4 * 512, windows + chunk)
    twice = used(GEMMA, (8 * 512, 8 * 66 + chunk))
    assert GEMMA.split(twice, None) == (8 * 512, 8 * 66 + chunk)


@pytest.mark.parametrize("memory_pages", range(1, 4000, 97))
def test_no_split_takes_more_than_there_is_nor_less_than_one_group_has(memory_pages: int) -> None:
    memory = memory_pages * LAYER_PAGE + 77
    pages = GEMMA.split(memory, None)
    assert memory - LAYER_PAGE < used(GEMMA, pages) <= memory
    assert pages[0] >= memory_pages
    assert pages[1] <= pages[0]


def test_a_stated_length_gets_its_pages_at_the_cost_of_concurrency() -> None:
    memory = used(GEMMA, (512, 66 + 32))
    assert GEMMA.split(memory, None)[0] < 512
    assert GEMMA.split(memory, 8192) == (512, 98)
    # There is no room for it: the division is as without.
    assert GEMMA.split(memory - 1, 8192) == GEMMA.split(memory - 1, None)
    narrow = replace(GEMMA, max_len_tokens=1030)
    assert narrow.split(narrow.wanted_bytes() * 2, None) == (2 * 4 * 65, 2 * 4 * 65)


def test_a_plan_has_both_groups() -> None:
    stated = used(GEMMA, (512, 98))
    settings = {
        "stated_bytes": stated,
        "free_bytes": 2**40,
        "fixed_bytes": 0,
        "bytes_per_page": LAYER_PAGE,
        "page_size": 16,
        "max_num_seqs": 4,
        "stated_max_model_len": 8192,
        "model_max_len": 8192,
        "groups": GEMMA,
    }
    plan = plan_pool(**settings)  # type: ignore[arg-type] # by name
    assert plan.windowed is not None
    assert (plan.num_pages, plan.windowed.num_pages) == (512, 98)
    assert plan.total_bytes == stated
    assert plan.max_model_len == 8192
    unstated = plan_pool(**settings | {"stated_bytes": None})  # type: ignore[arg-type] # by name
    assert unstated.total_bytes == GEMMA.wanted_bytes()
    with pytest.raises(MemoryPlanError, match="8192 tokens do not fit"):
        plan_pool(**settings | {"stated_bytes": stated - 1})  # type: ignore[arg-type] # by name
