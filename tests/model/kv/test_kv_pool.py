from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.moves import PageMove, PageRef, Tier
from model.kv.pool import KVPool

LAYERS, PAGES, PAGE_SIZE, HEADS, HEAD_DIM = 3, 5, 4, 2, 8


def make_pool(dtype: torch.dtype = torch.float32) -> KVPool:
    """A pool in which every (layer, page, token) holds a number of its own."""
    pool = KVPool(
        num_layers=LAYERS,
        num_pages=PAGES,
        page_size=PAGE_SIZE,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    numbers = torch.arange(PAGES * PAGE_SIZE).view(PAGES, PAGE_SIZE, 1, 1)
    for layer in range(LAYERS):
        pool.keys(layer).copy_(numbers + 100 * layer)
        pool.values(layer).copy_(-numbers - 100 * layer)
    return pool


def contents(pool: KVPool) -> list[list[int]]:
    """The numbers in the pages, the same in all layers, keys and values."""
    pages: list[list[int]] = pool.keys(0)[:, :, 0, 0].long().tolist()
    for layer in range(LAYERS):
        held = torch.tensor(pages)[:, :, None, None] + 100 * layer
        assert torch.equal(pool.keys(layer).long(), held.expand_as(pool.keys(layer)))
        assert torch.equal(pool.values(layer), -pool.keys(layer))
    return pages


def move(source: int, target: int, num_tokens: int) -> PageMove:
    return PageMove(PageRef(Tier.DEVICE, source), PageRef(Tier.DEVICE, target), num_tokens)


def test_pages_of_other_tiers_are_refused() -> None:
    pool = make_pool()
    for refs in (
        (PageRef(Tier.HOST, 0), PageRef(Tier.DEVICE, 1)),
        (PageRef(Tier.DEVICE, 0), PageRef(Tier.DISK, 1)),
    ):
        with pytest.raises(ValueError, match="only pages on the device"):
            pool.move_pages([PageMove(*refs, 1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_only_the_head_of_a_page_is_copied_in_every_layer(dtype: torch.dtype) -> None:
    pool = make_pool(dtype)
    pool.move_pages([move(1, 3, 3)])
    assert contents(pool)[3] == [4, 5, 6, 15]
    assert contents(pool)[1] == [4, 5, 6, 7]


def test_a_target_may_be_the_source_of_a_later_copy() -> None:
    pool = make_pool()
    pool.move_pages([move(0, 1, 4), move(1, 2, 4), move(3, 0, 4)])
    assert contents(pool)[:3] == [[12, 13, 14, 15], [0, 1, 2, 3], [0, 1, 2, 3]]


@settings(max_examples=50)
@given(
    st.lists(
        st.builds(
            move, st.integers(0, PAGES - 1), st.integers(0, PAGES - 1), st.integers(0, PAGE_SIZE)
        ).filter(lambda move: move.source != move.target),
        max_size=8,
    )
)
def test_moves_happen_one_after_another(moves: list[PageMove]) -> None:
    pool = make_pool()
    expected = contents(pool)
    for one in moves:
        head = expected[one.source.page_id][: one.num_tokens]
        expected[one.target.page_id][: one.num_tokens] = head
    pool.move_pages(moves)
    assert contents(pool) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_counted_before_and_after_alike(dtype: torch.dtype) -> None:
    each = KVPool.bytes_per_token(LAYERS, HEADS, HEAD_DIM, dtype)
    assert make_pool(dtype).total_bytes == each * PAGES * PAGE_SIZE
    assert each == 2 * 3 * 2 * 8 * dtype.itemsize
