from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.moves import PageMove, PageRef, Tier
from model.kv.format import KV_FORMATS, KVFormat, KVLayout, float_format
from model.kv.pool import KVPool

CPU = torch.device("cpu")
LAYERS, PAGES, PAGE_SIZE, HEADS, HEAD_DIM = 3, 5, 4, 2, 8


def layout_of(kv_format: KVFormat, latent_dim: int | None = None) -> KVLayout:
    return KVLayout(LAYERS, HEADS, HEAD_DIM, PAGE_SIZE, kv_format, latent_dim)


def make_pool(dtype: torch.dtype = torch.float32) -> KVPool:
    """Return a pool in which every (layer, page, token) holds a number of its own."""
    pool = KVPool(layout_of(float_format(dtype)), PAGES, CPU)
    numbers = torch.arange(PAGES * PAGE_SIZE).view(PAGES, PAGE_SIZE, 1, 1)
    for layer in range(LAYERS):
        pool.pages(layer).keys.copy_(numbers + 100 * layer)
        pool.pages(layer).values.copy_(-numbers - 100 * layer)
    return pool


def contents(pool: KVPool) -> list[list[int]]:
    """Return the numbers in the pages, the same in all layers, keys and values."""
    pages: list[list[int]] = pool.pages(0).keys[:, :, 0, 0].long().tolist()
    for layer in range(LAYERS):
        held = torch.tensor(pages)[:, :, None, None] + 100 * layer
        keys, values, _ = pool.pages(layer)
        assert torch.equal(keys.long(), held.expand_as(keys))
        assert torch.equal(values, -keys)
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
    pool = make_pool(dtype)
    planes = [plane for layer in range(LAYERS) for plane in pool.pages(layer)[:2]]
    each = pool.layout.bytes_per_page
    assert sum(plane.nbytes for plane in planes) == each * PAGES
    assert each == 2 * 3 * 2 * 8 * dtype.itemsize * PAGE_SIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_was_stored_is_loaded_as_the_format_rounds_it(dtype: torch.dtype) -> None:
    pool, before = make_pool(dtype), make_pool(dtype)
    slots = torch.tensor([7, 0, 19])
    k, v = torch.randn(2, 3, HEADS, HEAD_DIM)
    pool.store(1, slots, k, v)
    for found, wanted in zip(pool.load(1, slots), (k, v), strict=True):
        assert torch.equal(found.float(), wanted.to(dtype).float())
    others = torch.tensor([slot for slot in range(PAGES * PAGE_SIZE) if slot not in slots])
    for layer, kept in ((0, torch.arange(20)), (1, others), (2, torch.arange(20))):
        assert all(map(torch.equal, pool.load(layer, kept), before.load(layer, kept)))


def test_a_latent_layout_has_one_plane_of_which_values_are_a_part() -> None:
    """As multi-head latent attention stores one vector a token, whose head serves as the value."""
    layout = KVLayout(LAYERS, 1, HEAD_DIM, PAGE_SIZE, KV_FORMATS["float32"], latent_dim=6)
    pool = KVPool(layout, PAGES, CPU)
    assert layout.bytes_per_page == LAYERS * PAGE_SIZE * HEAD_DIM * 4
    k = torch.randn(2, 1, HEAD_DIM)
    pool.store(2, torch.tensor([4, 5]), k, k[..., :6])
    pool.move_pages([move(1, 3, 2)])
    keys, values = pool.load(2, torch.tensor([12, 13]))
    assert torch.equal(keys, k)
    assert torch.equal(values, k[..., :6])


def test_scales_count_in_bytes_and_move_with_their_page() -> None:
    """One for each token and head, so that a page's head has the same meaning in another page."""
    codes = KVFormat("int8", torch.int8, scale=torch.bfloat16)
    pool = KVPool(layout_of(codes), PAGES, CPU)
    assert pool.layout.bytes_per_page == 2 * LAYERS * PAGE_SIZE * HEADS * (HEAD_DIM + 2)
    assert codes.can_share_heads
    assert not replace(codes, group_tokens=PAGE_SIZE).can_share_heads
    for layer in range(LAYERS):
        assert [plane.shape for plane in pool.pages(layer).scales] == [
            (PAGES, PAGE_SIZE, HEADS)
        ] * 2
        for side, plane in enumerate(pool.pages(layer).scales):
            plane.copy_(torch.arange(PAGES).view(-1, 1, 1) + 10 * side)
    pool.move_pages([move(4, 2, 3)])
    for layer in range(LAYERS):
        keys, values = (plane[2, :, 1].tolist() for plane in pool.pages(layer).scales)
        assert (keys, values) == ([4, 4, 4, 2], [14, 14, 14, 12])
