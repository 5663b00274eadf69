from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_scenes import planes_of
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


@pytest.mark.parametrize(
    ("name", "latent_dim"),
    [*((name, None) for name in KV_FORMATS), ("bfloat16", 4), ("int8", 4)],
)
def test_the_contents_of_a_page_are_read_and_written_as_a_whole(
    name: str, latent_dim: int | None
) -> None:
    kv_format, head_dim, page_size = KV_FORMATS[name], 64, 32
    # The last layer has planes of another dtype, which begin anywhere.
    other = {} if latent_dim else {LAYERS - 1: float_format(torch.float32)}
    layout = KVLayout(LAYERS, 3, head_dim, page_size, kv_format, latent_dim, other)
    pools = [KVPool(layout, 3, CPU) for _ in range(2)]
    for plane in (plane for pool in pools for plane in pool._planes):
        plane.view(torch.uint8).random_(generator=torch.Generator().manual_seed(plane.data_ptr()))
    contents = pools[0].read_page(2)
    assert len(contents) == layout.bytes_per_page
    before = [[plane[:, page].clone() for page in (0, 2)] for plane in pools[1]._planes]
    pools[1].write_page(1, memoryview(bytearray(contents)))
    assert pools[1].read_page(1) == contents
    for plane, source, others in zip(pools[1]._planes, pools[0]._planes, before, strict=True):
        assert torch.equal(plane[:, 1].view(torch.uint8), source[:, 2].view(torch.uint8))
        for page, kept in zip((0, 2), others, strict=True):
            assert torch.equal(plane[:, page].view(torch.uint8), kept.view(torch.uint8))
    with pytest.raises(AssertionError, match="another layout"):
        pools[1].write_page(1, memoryview(bytearray(len(contents) + 1)))


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
    pool = KVPool(layout_of(KV_FORMATS["int8"]), PAGES, CPU)
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


@pytest.mark.parametrize(
    ("name", "vector_bytes"),
    [("float16", 2 * HEAD_DIM), ("int8", HEAD_DIM + 2), ("fp8", HEAD_DIM + 2), ("int4", 8)],
)
def test_stored_codes_are_loaded_as_the_format_decodes_them(name: str, vector_bytes: int) -> None:
    """Codes and scales are written together, to these slots alone, and move with their page."""
    kv_format = KV_FORMATS[name]
    pool = KVPool(layout_of(kv_format), PAGES, CPU)
    assert pool.layout.bytes_per_page == 2 * LAYERS * PAGE_SIZE * HEADS * vector_bytes
    assert kv_format.can_share_heads
    everywhere = torch.arange(PAGES * PAGE_SIZE)
    for layer in range(LAYERS):
        pool.store(layer, everywhere, *torch.zeros(2, len(everywhere), HEADS, HEAD_DIM))
    slots = torch.tensor([7, 0, 19])
    k, v = torch.randn(2, 3, HEADS, HEAD_DIM)
    pool.store(1, slots, k, v)
    wanted = [kv_format.decode(*kv_format.encode(one)) for one in (k, v)]
    assert all(map(torch.equal, pool.load(1, slots), wanted))
    assert [one.count_nonzero(dim=-1).gt(0).all(-1).sum() for one in pool.load(1, everywhere)] == [
        3,
        3,
    ]
    assert not any(one.any() for layer in (0, 2) for one in pool.load(layer, everywhere))
    # Slot 7 is the last token of page 1, which stays behind.
    pool.move_pages([move(1, 3, 3), move(0, 2, 1)])
    keys, values = pool.load(1, everywhere)
    assert torch.equal(keys[8], wanted[0][1])
    assert torch.equal(values[8], wanted[1][1])
    assert not keys[12:16].any()


def test_layers_may_have_formats_of_their_own() -> None:
    layout = KVLayout(
        LAYERS,
        HEADS,
        HEAD_DIM,
        PAGE_SIZE,
        KV_FORMATS["int8"],
        other_formats={1: KV_FORMATS["float32"]},
    )
    pool = KVPool(layout, PAGES, CPU)
    held = [plane for layer in range(LAYERS) for plane in planes_of(pool.pages(layer))]
    assert sum(plane.nbytes for plane in held) == layout.bytes_per_page * PAGES
    assert layout.bytes_per_page == 2 * PAGE_SIZE * HEADS * (2 * (HEAD_DIM + 2) + 4 * HEAD_DIM)
    k, v = torch.randn(2, 2, HEADS, HEAD_DIM)
    for layer in range(LAYERS):
        pool.store(layer, torch.tensor([4, 5]), k, v)
    pool.move_pages([move(1, 3, 2)])
    for layer, is_exact in enumerate((False, True, False)):
        keys, values = pool.load(layer, torch.tensor([12, 13]))
        assert torch.equal(keys, k) == torch.equal(values, v) == is_exact
        torch.testing.assert_close(keys, k, rtol=0, atol=0.02)


def test_a_page_that_was_encoded_as_a_whole_moves_as_a_whole() -> None:
    pool = KVPool(layout_of(KV_FORMATS["kivi4"]), PAGES, CPU)
    held = [plane for layer in range(LAYERS) for plane in planes_of(pool.pages(layer))]
    assert sum(plane.nbytes for plane in held) == pool.layout.bytes_per_page * PAGES
    k, v = torch.randn(2, 2 * PAGE_SIZE, HEADS, HEAD_DIM)
    for layer in range(LAYERS):
        pool.store_pages(layer, torch.tensor([4, 1]), k, v)
    pool.move_pages([move(1, 3, PAGE_SIZE)])
    for layer in range(LAYERS):
        loaded = pool.load_pages(layer, torch.tensor([4, 3]))
        for found, new in zip(loaded, (k, v), strict=True):
            torch.testing.assert_close(found.float(), new, rtol=0, atol=0.3)
        assert torch.equal(loaded[0][PAGE_SIZE:], pool.load_pages(layer, torch.tensor([1]))[0])
    with pytest.raises(ValueError, match="no heads of their own"):
        pool.move_pages([move(1, 2, PAGE_SIZE - 1)])


def test_two_codes_a_byte_need_an_even_head() -> None:
    layout = KVLayout(LAYERS, HEADS, 27, PAGE_SIZE, KV_FORMATS["int4"])
    with pytest.raises(ValueError, match="int4 needs heads of a multiple of 2 elements, got 27"):
        _ = layout.bytes_per_page


def test_codes_of_latent_vectors_leave_the_rotated_part_in_16_bits() -> None:
    int8 = KV_FORMATS["int8"]
    layout = KVLayout(LAYERS, 1, 576, PAGE_SIZE, int8, latent_dim=512)
    assert layout.bytes_per_page == LAYERS * PAGE_SIZE * (512 + 4 * 2 + 64 * 2)
    pool = KVPool(layout, PAGES, CPU)
    k = torch.randn(3, 1, 576)
    # A number that is not finite is a matter of its own row.
    k[2, 0, 7] = torch.inf
    pool.store(2, torch.tensor([4, 5, 6]), k, k[..., :512])
    pool.move_pages([move(1, 3, 3)])
    keys, values = pool.load(2, torch.tensor([12, 13, 14]))
    assert torch.equal(values[:2], keys[:2, :, :512])
    assert torch.equal(keys[:2, :, 512:], k[:2, :, 512:].bfloat16().float())
    error = (keys[:2] - k[:2]).abs().max() / k[:2].abs().max()
    assert 0 < error < 0.01
    assert keys[2].isnan().any()
    for name in ("fp8", "int4", "kivi4"):
        with pytest.raises(ValueError, match=f"kv_cache_dtype {name} .* the nearest is int8"):
            replace(layout, format=KV_FORMATS[name]).planes(0)
