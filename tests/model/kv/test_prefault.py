from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from model.kv.arena import Arena
from model.kv.format import KV_FORMATS, KVLayout
from model.kv.pool import KVPool
from model.kv.prefault import Prefault

_MIB = 2**20


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _regions(num_regions: int, num_pages: int, page_bytes: int) -> Tensor:
    return Arena().take((num_regions, num_pages, page_bytes), torch.uint8)


def _touch_all(prefault: Prefault) -> int:
    steps = 0
    while prefault.step():
        prefault.check()
        steps += 1
    return steps


def test_memory_is_there_before_it_is_written() -> None:
    regions = _regions(4, 4096, 8192)
    prefault = Prefault(regions, ahead_bytes=128 * _MIB)
    before = _resident_bytes()
    assert _touch_all(prefault) > 1
    assert prefault.touched_pages == 4096
    assert _resident_bytes() - before > 120 * _MIB


def test_no_more_is_taken_than_so_much_ahead_of_what_is_in_use() -> None:
    prefault = Prefault(_regions(2, 8192, 4096), ahead_bytes=8 * _MIB)
    _touch_all(prefault)
    first = prefault.touched_pages
    assert 1024 <= first < 2048
    prefault.reach(100)
    prefault.reach(7)
    _touch_all(prefault)
    assert prefault.touched_pages - 1024 >= 100
    prefault.reach(8191)
    _touch_all(prefault)
    assert prefault.touched_pages == 8192
    assert not prefault.step()


def test_what_pages_hold_stays() -> None:
    regions = _regions(3, 1000, 1000)
    regions[:] = torch.arange(3000).view(3, 1000, 1).to(torch.uint8)
    expected = regions.clone()
    prefault = Prefault(regions)
    prefault.reach(999)
    _touch_all(prefault)
    assert torch.equal(regions, expected)


def test_a_pool_uses_its_idle_moments() -> None:
    layout = KVLayout(2, 3, 64, 16, KV_FORMATS["bfloat16"])
    pool = KVPool(layout, 64, torch.device("cpu"))
    assert pool.idle()
    while pool.idle():
        pass
    pool.take_step([[63]], [])
    assert not pool.idle()
