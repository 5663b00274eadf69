from __future__ import annotations

import dataclasses

import pytest
import torch

from model.attention.cpu import CpuAttention, offer
from model.attention.interface import AttentionBatch, AttentionSpec
from model.cpu.library import CpuLibrary, load_cpu_library
from model.kv.format import KV_FORMATS
from model.kv.pool import KVPool

CPU = torch.device("cpu")
PAGE_SIZE, NUM_PAGES = 16, 80
SPEC = AttentionSpec(
    num_layers=1,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    scale=0.125,
    windows=(None,),
    dtype=torch.float32,
    kv_format=KV_FORMATS["float32"],
    device=CPU,
)


@pytest.fixture(scope="module")
def library() -> CpuLibrary:
    library = load_cpu_library()
    if isinstance(library, str):
        pytest.skip(library)
    return library


def attention(library: CpuLibrary) -> CpuAttention:
    pool = KVPool(SPEC.layout(PAGE_SIZE), NUM_PAGES, CPU)
    generator = torch.Generator().manual_seed(1)
    for pages in pool.pages(0)[:2]:
        pages.copy_(torch.randn(pages.shape, generator=generator))
    return CpuAttention(SPEC, pool, library)


def step(*rows: tuple[int, int, int]) -> AttentionBatch:
    """Return a batch; rows are (first page, tokens of this step, tokens in all)."""
    width = max(-(-end // PAGE_SIZE) for _, _, end in rows)
    table = torch.zeros(len(rows), width, dtype=torch.int32)
    positions, slots = [], []
    for row, (page, count, end) in enumerate(rows):
        table[row] = (torch.arange(width) + page) % NUM_PAGES
        at = torch.arange(end - count, end)
        positions.append(at)
        slots.append((at // PAGE_SIZE + page) * PAGE_SIZE + at % PAGE_SIZE)
    return AttentionBatch(
        query_starts=torch.tensor([0, *(row[1] for row in rows)]).cumsum(0).int(),
        seq_lens=torch.tensor([row[2] for row in rows]).int(),
        block_table=table,
        positions=torch.cat(positions),
        kv_slots=torch.cat(slots),
        max_query_len=max(row[1] for row in rows),
        max_seq_len=max(row[2] for row in rows),
    )


def attend(backend: CpuAttention, batch: AttentionBatch, qkv: torch.Tensor) -> torch.Tensor:
    backend.plan(batch)
    heads = qkv.view(len(qkv), 10, 64)
    return backend.attend(0, heads[:, :6], heads[:, 6:8], heads[:, 8:])


@pytest.mark.parametrize(("count", "end"), [(1, 600), (1, 30), (50, 400)])
def test_a_row_gives_the_same_bits_in_any_company(
    library: CpuLibrary, count: int, end: int
) -> None:
    others = [(40, 1, 300), (60, 33, 33), (64, 1, 200)]
    qkv = torch.randn(count + 35, 640, generator=torch.Generator().manual_seed(2))
    alone = attend(attention(library), step((0, count, end)), qkv[:count])
    together = attend(attention(library), step((0, count, end), *others), qkv)
    assert torch.equal(alone, together[:count])


def test_a_row_gives_the_same_bits_on_one_thread(library: CpuLibrary) -> None:
    batch = step((0, 1, 600), (40, 20, 200))
    qkv = torch.randn(21, 640, generator=torch.Generator().manual_seed(3))
    threads = torch.get_num_threads()
    results = []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        results.append(attend(attention(library), batch, qkv))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_slots": torch.tensor([PAGE_SIZE * NUM_PAGES])}, "kv_slots"),
        ({"kv_slots": torch.tensor([-1])}, "kv_slots"),
        ({"block_table": torch.full((1, 2), NUM_PAGES, dtype=torch.int32)}, "outside the pool"),
        ({"block_table": torch.zeros(1, 1, dtype=torch.int32)}, "too few pages"),
        ({"seq_lens": torch.zeros(1, dtype=torch.int32)}, "seq_lens"),
        ({"query_starts": torch.tensor([0, 2], dtype=torch.int32)}, "query_starts"),
        ({"kv_slots": torch.zeros(2, dtype=torch.int64)[::2]}, "contiguous"),
        ({"block_table": torch.zeros(1, 4, dtype=torch.int32)[:, ::2]}, "contiguous"),
    ],
)
def test_a_step_that_would_leave_the_pool_is_refused(
    library: CpuLibrary, change: dict[str, torch.Tensor], message: str
) -> None:
    batch = dataclasses.replace(step((0, 1, 20)), **change)  # type: ignore[arg-type] # tensors all
    if message == "contiguous" and "kv_slots" in change:
        batch = dataclasses.replace(batch, kv_slots=torch.zeros(4, dtype=torch.int64)[::2])
    with pytest.raises(ValueError, match=message):
        attention(library).plan(batch)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("meta")}, "meta"),
        ({"head_dim": 40}, "head_dim must be a multiple of 16"),
        ({"head_dim": 2048}, "got 2048"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_it_says_what_it_cannot_serve(change: dict[str, object], reason: str) -> None:
    assert reason in str(offer(dataclasses.replace(SPEC, **change)))  # type: ignore[arg-type] # one field
