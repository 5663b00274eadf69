from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.kv.memory_plan import MemoryPlanError, free_memory_bytes, plan_pool


def _plan(**changes: Any) -> Any:
    given = {
        "stated_bytes": None,
        "free_bytes": 10_000,
        "fixed_bytes": 0,
        "bytes_per_page": 40,
        "page_size": 4,
        "max_num_seqs": 3,
        "stated_max_model_len": None,
        "model_max_len": 50,
    }
    return plan_pool(**(given | changes))


def test_unstated_is_what_all_sequences_at_their_longest_need() -> None:
    plan = _plan()
    assert plan.num_pages == 3 * 13
    assert plan.total_bytes == 3 * 13 * 40
    assert plan.max_model_len == 50
    assert plan.notes == ()


def test_unstated_is_at_most_half_of_what_is_free_and_says_what_that_costs() -> None:
    plan = _plan(free_bytes=800)
    assert plan.num_pages == 10
    assert plan.max_model_len == 40
    assert "40 tokens" in plan.notes[0]
    assert "50" in plan.notes[0]


def test_what_is_needed_beside_the_pages_is_not_free_for_them() -> None:
    assert _plan(free_bytes=1000, fixed_bytes=200).num_pages == 10
    assert _plan(free_bytes=1000, fixed_bytes=200, takes_all=True).num_pages == 20
    with pytest.raises(MemoryPlanError, match="only 800 B are free"):
        _plan(free_bytes=1000, fixed_bytes=200, stated_bytes=801)
    with pytest.raises(MemoryPlanError, match=r"raise --kv-cache-memory"):
        _plan(free_bytes=1000, fixed_bytes=2000)


def test_stated_is_taken_to_the_page() -> None:
    assert _plan(stated_bytes=1234).num_pages == 30


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stated_bytes": 10_001}, r"kv_cache_memory.*lower --kv-cache-memory by 1 B"),
        ({"stated_bytes": 39}, r"kv_cache_memory.*no page of 4 tokens"),
        ({"free_bytes": 10}, r"raise --kv-cache-memory"),
        ({"stated_max_model_len": 51}, r"max_model_len.*model's own 50"),
        (
            {"stated_bytes": 400, "stated_max_model_len": 45},
            r"--kv-cache-memory by 50 B or lower --max-model-len to 40",
        ),
    ],
)
def test_what_cannot_fit_says_by_how_much_and_which_flag(
    changes: dict[str, int], said: str
) -> None:
    with pytest.raises(MemoryPlanError, match=said):
        _plan(**changes)


def test_free_memory_is_the_containers_if_that_is_less(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:   50 kB\n")
    assert free_memory_bytes(meminfo, tmp_path) == 50 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert free_memory_bytes(meminfo, tmp_path) == 50 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_memory_bytes(meminfo, tmp_path) == 4000
    # Regression: the file of the model itself, just read, was taken for memory in use.
    (tmp_path / "memory.stat").write_text("anon 300\nfile 700\ninactive_file 600\n")
    assert free_memory_bytes(meminfo, tmp_path) == 4600


def test_this_machine_has_memory() -> None:
    assert free_memory_bytes() > 2**20
