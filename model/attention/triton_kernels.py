"""Paged attention in Triton: decode with split keys, prompts tile by tile. Needs triton.

Knows nothing of torch, of plans or of the number of splits (`triton_attention.py`), nor of the keys
that a query reads (`triton_tile_kernels.py`).

A row's tokens are `query_starts[row]:query_starts[row + 1]` of the batch and the last of its
`seq_lens[row]` stored keys; key i is in page `table[row, i // PAGE_SIZE]`. `sink_q` is contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.attention.triton_tile_kernels import attend, row_view, tiles

#: The addresses of a step's arrays and the width of its table change from step to step. By default
#: Triton would compile for each alignment and each kind of width, while requests wait.
OF_A_STEP = [
    *("table_ptr", "seq_lens_ptr", "query_starts_ptr"),
    *("row_sinks_ptr", "row_windows_ptr"),
]
WIDTH = ["table_stride"]


@triton.jit(do_not_specialize=WIDTH, do_not_specialize_on_alignment=OF_A_STEP)
def decode_kernel(
    q_ptr,
    sink_q_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    table_ptr,
    seq_lens_ptr,
    query_starts_ptr,
    row_sinks_ptr,
    row_windows_ptr,
    scale_log2,
    window,
    q_token_stride,
    q_head_stride,
    slot_stride,
    table_stride,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    LANES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    KIND: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    HAS_VIEWS: tl.constexpr,
):
    """Attend one row's few queries to one share of its keys, for the query heads of a KV head.

    Grid: rows, blocks of `LANES` pairs of a query and a head of each KV head, splits. Rows with
    more than `QUERIES` queries are skipped. With one split the result is `out`
    `[tokens, heads, HEAD_DIM]`; with more, `partial` `[rows, QUERIES, heads, splits, HEAD_DIM]` and
    `lse` (base 2) `[rows, QUERIES, heads, splits]`, for `combine_kernel`.

    Tile i of a row's keys is of split `i % NUM_SPLITS` (a power of two), in whichever row its
    queries are. A tile without a key that a query sees leaves the query's sums as they are.
    """
    BLOCKS: tl.constexpr = (QUERIES * GROUP + LANES - 1) // LANES
    row, split = tl.program_id(0), tl.program_id(2)
    kv_head, block = tl.program_id(1) // BLOCKS, tl.program_id(1) % BLOCKS
    first_token = tl.load(query_starts_ptr + row)
    count = tl.load(query_starts_ptr + row + 1) - first_token
    if (count > QUERIES) | (block * LANES >= count * GROUP):
        return
    num_keys = tl.load(seq_lens_ptr + row)
    past = num_keys - count
    sinks, bound = row_view(row, row_sinks_ptr, row_windows_ptr, HAS_VIEWS)
    begin, first_key, sink_begin, first_sink, end_sink = tiles(
        past, num_keys, split, window, sinks, bound, TILE, NUM_SPLITS, HAS_VIEWS
    )
    lanes = block * LANES + tl.arange(0, LANES)
    queries, heads = lanes // GROUP, kv_head * GROUP + lanes % GROUP
    is_lane = queries < count
    num_heads = tl.num_programs(1) // BLOCKS * GROUP
    split_at = ((row.to(tl.int64) * QUERIES + queries) * num_heads + heads) * NUM_SPLITS + split
    if (begin >= num_keys) & (sink_begin >= end_sink):
        # The row is too short for so many splits.
        tl.store(lse_ptr + split_at, -float("inf"), mask=is_lane)
        return

    dims = tl.arange(0, DIM_BLOCK)
    mask = is_lane[:, None] & (dims < HEAD_DIM)[None, :]
    tokens = (first_token + queries).to(tl.int64)
    q_at = tokens[:, None] * q_token_stride + heads[:, None] * q_head_stride + dims[None, :]
    out_at = (tokens * num_heads + heads)[:, None] * HEAD_DIM + dims[None, :]
    result, lse = attend(
        q_ptr,
        sink_q_ptr,
        keys_ptr,
        values_ptr,
        key_scales_ptr,
        value_scales_ptr,
        q_at,
        out_at,
        mask,
        past + queries,
        num_keys,
        begin,
        first_key,
        sink_begin,
        first_sink,
        end_sink,
        window,
        sinks,
        bound,
        table_ptr + row.to(tl.int64) * table_stride,
        slot_stride,
        kv_head,
        num_heads // GROUP,
        scale_log2,
        LANES,
        PAGE_SIZE,
        TILE,
        NUM_SPLITS,
        HEAD_DIM,
        DIM_BLOCK,
        KIND,
        DOT_DTYPE,
        WEIGHT_DTYPE,
        HAS_VIEWS,
    )
    if NUM_SPLITS == 1:
        tl.store(out_ptr + out_at, result.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(partial_ptr + split_at[:, None] * HEAD_DIM + dims[None, :], result, mask=mask)
        tl.store(lse_ptr + split_at, lse, mask=is_lane)


@triton.jit(do_not_specialize_on_alignment=OF_A_STEP)
def combine_kernel(
    partial_ptr,
    lse_ptr,
    out_ptr,
    query_starts_ptr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    """Combine the splits of one head of one query by their log-sum-exp.

    Grid: rows times `QUERIES`, heads.
    """
    place, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, query = place // QUERIES, place % QUERIES
    first_token = tl.load(query_starts_ptr + row)
    count = tl.load(query_starts_ptr + row + 1) - first_token
    if (count > QUERIES) | (query >= count):
        return
    splits, dims = tl.arange(0, NUM_SPLITS), tl.arange(0, DIM_BLOCK)
    split_at = (place.to(tl.int64) * num_heads + head) * NUM_SPLITS + splits
    lse = tl.load(lse_ptr + split_at)
    is_dim = dims < HEAD_DIM
    # A split without keys may have written no result, so it is not read.
    mask = (lse > -float("inf"))[:, None] & is_dim[None, :]
    partial_at = split_at[:, None] * HEAD_DIM + dims[None, :]
    partial = tl.load(partial_ptr + partial_at, mask=mask, other=0.0)
    weights = tl.exp2(lse - tl.max(lse, 0))
    result = tl.sum(weights[:, None] * partial, 0) / tl.sum(weights, 0)
    out_at = ((first_token + query).to(tl.int64) * num_heads + head) * HEAD_DIM + dims
    tl.store(out_ptr + out_at, result.to(out_ptr.dtype.element_ty), mask=is_dim)


@triton.jit(do_not_specialize=WIDTH, do_not_specialize_on_alignment=OF_A_STEP)
def prompt_kernel(
    q_ptr,
    sink_q_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    out_ptr,
    table_ptr,
    seq_lens_ptr,
    query_starts_ptr,
    row_sinks_ptr,
    row_windows_ptr,
    scale_log2,
    window,
    q_token_stride,
    q_head_stride,
    slot_stride,
    table_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    FEW_QUERIES: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    TILE: tl.constexpr,
    KIND: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    HAS_VIEWS: tl.constexpr,
):
    """Attend a tile of one row's queries, for one head.

    Grid: tiles of the longest row, heads, rows. Rows of at most `FEW_QUERIES` queries are left
    to `decode_kernel`.
    """
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_token = tl.load(query_starts_ptr + row)
    count = tl.load(query_starts_ptr + row + 1) - first_token
    if (count <= FEW_QUERIES) | (tile * QUERY_TILE >= count):
        return
    past = tl.load(seq_lens_ptr + row) - count
    end = past + tl.minimum((tile + 1) * QUERY_TILE, count)
    sinks, bound = row_view(row, row_sinks_ptr, row_windows_ptr, HAS_VIEWS)
    begin, first_key, sink_begin, first_sink, end_sink = tiles(
        past + tile * QUERY_TILE, end, 0, window, sinks, bound, TILE, 1, HAS_VIEWS
    )
    num_heads = tl.num_programs(1)
    queries = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    dims = tl.arange(0, DIM_BLOCK)
    mask = (queries < count)[:, None] & (dims < HEAD_DIM)[None, :]
    tokens = (first_token + queries).to(tl.int64)
    q_at = tokens[:, None] * q_token_stride + head * q_head_stride + dims[None, :]
    out_at = (tokens * num_heads + head)[:, None] * HEAD_DIM + dims[None, :]
    result, _ = attend(
        q_ptr,
        sink_q_ptr,
        keys_ptr,
        values_ptr,
        key_scales_ptr,
        value_scales_ptr,
        q_at,
        out_at,
        mask,
        past + queries,
        end,
        begin,
        first_key,
        sink_begin,
        first_sink,
        end_sink,
        window,
        sinks,
        bound,
        table_ptr + row.to(tl.int64) * table_stride,
        slot_stride,
        head // GROUP,
        num_heads // GROUP,
        scale_log2,
        QUERY_TILE,
        PAGE_SIZE,
        TILE,
        1,
        HEAD_DIM,
        DIM_BLOCK,
        KIND,
        DOT_DTYPE,
        WEIGHT_DTYPE,
        HAS_VIEWS,
    )
    tl.store(out_ptr + out_at, result.to(out_ptr.dtype.element_ty), mask=mask)
