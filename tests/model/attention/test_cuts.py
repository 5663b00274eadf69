"""On every instruction set no cut of a sequence changes a bit of a token's attention."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from attention_scenes import poison
from model.attention.cpu import CpuAttention
from model.attention.interface import AttentionBatch, AttentionSpec
from model.cpu.instruction_sets import ISAS
from model.cpu.library import CpuLibrary, load_cpu_library
from model.kv.format import CODED_FORMATS, FLOAT_FORMATS, PAGE_FORMATS, KVFormat
from model.kv.pool import KVPool

CPU = torch.device("cpu")
#: Two chunks of 256 keys and a part of a third.
LENGTH = 600
CUTS: dict[str, tuple[int, ...]] = {
    "token by token": tuple(range(1, LENGTH)),
    "at chunks": (256, 512),
    "across chunks": (3, 250, 262, 509, 515),
    "few and many": (1, 5, 6, 70, 255, 256, 257, 262, 300, 301, 511, 540, 545),
}


@pytest.fixture(scope="module", params=ISAS)
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    library = load_cpu_library(isa=request.param)
    if isinstance(library, str):
        pytest.skip(library)
    return library


def attend(
    library: CpuLibrary, spec: AttentionSpec, page_size: int, qkv: Tensor, cuts: tuple[int, ...]
) -> Tensor:
    """Attend one sequence, a step for each piece; keys and values that it may not read are NaN."""
    num_pages = -(-LENGTH // page_size)
    pool = KVPool(spec.layout(page_size), num_pages, CPU)
    poison(pool.pages(0))
    backend = CpuAttention(spec, pool, library)
    table = torch.arange(num_pages, dtype=torch.int32).flip(0)
    last = spec.num_heads + spec.num_kv_heads
    found = []
    for start, end in pairwise((0, *cuts, LENGTH)):
        positions = torch.arange(start, end)
        slots = table[positions // page_size].long() * page_size + positions % page_size
        backend.plan(
            AttentionBatch(
                query_starts=torch.tensor([0, end - start], dtype=torch.int32),
                seq_lens=torch.tensor([end], dtype=torch.int32),
                block_table=table[None],
                positions=positions,
                kv_slots=slots,
                max_query_len=end - start,
                max_seq_len=end,
                slots=(0,),
            )
        )
        own = qkv[start:end]
        found.append(
            backend.attend(
                0, own[:, : spec.num_heads], own[:, spec.num_heads : last], own[:, last:]
            )
        )
    return torch.cat(found)


#: Page size, head size, KV heads, query heads to each, window. Keys are used as they lie in their
#: pages, or are copied; lanes are few or many.
SHAPES = (
    (16, 64, 3, 3, None),
    (32, 128, 1, 8, None),
    (16, 96, 1, 1, 40),
    (16, 80, 1, 20, 300),
    (5, 32, 2, 7, 1),
    (16, 48, 1, 5, None),
    (16, 16, 2, 70, 257),
    (64, 256, 1, 2, 100),
)
CASES = [
    *((kv_format, *shape) for kv_format in FLOAT_FORMATS for shape in SHAPES),
    *((kv_format, *shape) for kv_format in CODED_FORMATS for shape in SHAPES[:4]),
    *((kv_format, *shape) for kv_format in PAGE_FORMATS for shape in (SHAPES[0], *SHAPES[3:5])),
]


@pytest.mark.parametrize(
    ("kv_format", "page_size", "head_dim", "num_kv_heads", "group", "window"),
    CASES,
    ids=lambda one: getattr(one, "name", str(one)),
)
def test_no_cut_changes_a_bit(
    library: CpuLibrary,
    kv_format: KVFormat,
    page_size: int,
    head_dim: int,
    num_kv_heads: int,
    group: int,
    window: int | None,
) -> None:
    spec = AttentionSpec(
        num_layers=1,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        windows=(window,),
        dtype=torch.float32,
        kv_format=kv_format,
        device=CPU,
    )
    generator = torch.Generator().manual_seed(5)
    # Large scores: some weights are too small to count, some keys weigh all there is.
    qkv = 3 * torch.randn(LENGTH, num_kv_heads * (group + 2), head_dim, generator=generator)
    whole = attend(library, spec, page_size, qkv, ())
    assert whole.isfinite().all()
    for name, cuts in CUTS.items():
        assert torch.equal(attend(library, spec, page_size, qkv, cuts), whole), name
