"""Rows of few queries in the decode kernel: the result of a query does not depend on its row.

Interpreted where there is no GPU; `test_contract.py` compares results with dense attention.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from attention_scenes import Scene, make_scene, with_views
from cache.view import FULL_VIEW, View
from model.attention import triton_attention
from model.attention.interface import FEW_QUERIES
from model.attention.triton_attention import TritonAttention
from model.kv.format import KV_FORMATS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Queries of a row of the other kernel.
PROMPT = FEW_QUERIES + 1
#: A border between tiles of 64 keys is among the last queries, and the window of some begins there.
LENGTH, WINDOW = 132, 65


def read(scene: Scene, rows: list[tuple[int, int]], view: View = FULL_VIEW) -> list[Tensor]:
    """Attend rows of (first, number) of the scene's queries; return the result of each row.

    The scene has one row, whose keys are stored. Towards sinks stand its queries in reverse.
    """
    end = int(scene.batch.seq_lens[0]) - len(scene.qkv)
    counts = [count for _, count in rows]
    starts = torch.tensor([0, *counts]).cumsum(0)
    batch = replace(
        scene.batch,
        query_starts=starts.int().to(DEVICE),
        seq_lens=torch.tensor([end + sum(row) for row in rows]).int().to(DEVICE),
        block_table=scene.batch.block_table.repeat(len(rows), 1),
        positions=torch.cat([scene.batch.positions[first : first + n] for first, n in rows]),
        max_query_len=max(counts),
        max_seq_len=max(end + sum(row) for row in rows),
    )
    backend = TritonAttention(scene.spec, scene.pool)
    backend.plan(with_views(batch, (view,) * len(rows)))
    q = scene.parts[0]
    both = (torch.cat([one[first : first + n] for first, n in rows]) for one in (q, q.flip(0)))
    found = backend.read(0, *both)
    return [found[begin:end] for begin, end in pairwise(starts.tolist())]


@pytest.mark.parametrize(
    ("page_size", "heads", "head_dim", "window", "splits", "kv_format", "view"),
    [
        (16, (1, 3), 32, None, 4, "float32", FULL_VIEW),
        (64, (1, 1), 32, WINDOW, 2, "int8", FULL_VIEW),
        (1, (1, 8), 32, None, 2, "float16", FULL_VIEW),
        (48, (1, 4), 80, WINDOW, 1, "fp8", FULL_VIEW),
        (16, (1, 3), 48, None, 2, "int4", FULL_VIEW),
        # More pairs of a query and a head than one program takes.
        (256, (1, 12), 32, 3, 1, "float32", FULL_VIEW),
        (16, (2, 1), 16, WINDOW, 2, "float32", FULL_VIEW),
        # From a query in the middle on in view; the last sinks share a tile with other keys.
        (16, (1, 3), 32, None, 2, "float32", View(70, 56)),
        (16, (1, 2), 16, 50, 2, "int4", View(70, 56)),
        (64, (1, 2), 16, None, 1, "float32", View(4, 123)),
    ],
)
def test_a_query_has_the_same_bits_in_every_row(
    page_size: int,
    heads: tuple[int, int],
    head_dim: int,
    window: int | None,
    splits: int,
    kv_format: str,
    view: View,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The interpreter multiplies by BLAS, whose sums depend on the number of rows. On a GPU they do
    # not: see `test_kernels_compile.py`.
    monkeypatch.setattr(triton_attention, "_MIN_LANES", triton_attention._MAX_LANES)
    monkeypatch.setattr(triton_attention, "num_splits", lambda *_: splits)
    scene = make_scene(
        ((PROMPT, LENGTH),),
        head_dim=head_dim,
        num_kv_heads=heads[0],
        group=heads[1],
        page_size=page_size,
        kv_format=KV_FORMATS[kv_format],
        windows=(window,),
    ).on(DEVICE)
    _, k, v = scene.parts
    scene.pool.store(0, scene.batch.kv_slots, k, v)
    alone = torch.cat([read(scene, [(first, 1)], view)[0] for first in range(FEW_QUERIES)])
    assert alone.isfinite().all()
    # As many queries a row as the kernel is compiled for, and fewer; alone, and beside a prompt.
    for rows in (
        [(0, 2), (7, 1)],
        [(4, 4), (1, 3)],
        [(0, 8), (1, 7), (0, 6), (3, 5)],
        [(5, 2), (0, PROMPT), (6, 1)],
    ):
        for (first, count), found in zip(rows, read(scene, rows, view), strict=True):
            if count < PROMPT:
                assert torch.equal(found, alone[first : first + count]), f"{count} from {first}"


def test_rows_without_a_query_and_tokens_of_no_row_change_no_other() -> None:
    """As `DecodeGraphs` pads steps."""
    scene = make_scene(((3, 70), (1, 9)), num_kv_heads=1).on(DEVICE)
    q, k, v = scene.parts
    scene.pool.store(0, scene.batch.kv_slots, k, v)
    results = []
    for counts, rows in (((3, 1), [0, 1]), ((3, 1, 0), [0, 1, 1])):
        backend = TritonAttention(scene.spec, scene.pool)
        starts = torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE)
        batch = replace(
            scene.batch,
            query_starts=starts,
            seq_lens=scene.batch.seq_lens[rows],
            block_table=scene.batch.block_table[rows],
            max_query_len=FEW_QUERIES,
        )
        backend.plan(batch)
        results.append(backend.read(0, torch.cat((q, q[:2])[: len(counts) - 1]))[:4])
    expected = scene.expected(0)
    for found in results:
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "other_kernel"),
    [(FEW_QUERIES, "_read_prompts"), (FEW_QUERIES + 1, "_read_decodes")],
)
def test_the_number_of_queries_of_a_row_alone_chooses_its_kernel(
    count: int, other_kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, and beside a longer prompt."""
    monkeypatch.setattr(TritonAttention, other_kernel, lambda *_: None)
    scene = make_scene(((count, 75), (20, 20)), num_kv_heads=1).on(DEVICE)
    q, k, v = scene.parts
    scene.pool.store(0, scene.batch.kv_slots, k, v)
    for rows, longest in ((1, count), (2, 20)):
        batch = replace(
            scene.batch,
            query_starts=scene.batch.query_starts[: rows + 1],
            seq_lens=scene.batch.seq_lens[:rows],
            block_table=scene.batch.block_table[:rows],
            max_query_len=longest,
        )
        backend = TritonAttention(scene.spec, scene.pool)
        backend.plan(batch)
        found = backend.read(0, q[: batch.query_starts[-1]])[:count]
        expected = scene.expected(0)[:count]
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-5)
