"""Paged attention in Triton: decode with split keys, prompts tile by tile. Needs triton.

Knows nothing of torch, of plans or of the number of splits (`triton_attention.py`). Scores are in
base 2, the base of the hardware's exponential.

A row's tokens are `query_starts[row]:query_starts[row + 1]` of the batch and the last of its
`seq_lens[row]` stored keys; key i is in page `table[row, i // PAGE_SIZE]`. A query sees `window`
tokens back, its own included; no key before the first query's window is read.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: The addresses of a step's arrays and the width of its table change from step to step. By default
#: Triton would compile for each alignment and each kind of width, while requests wait.
OF_A_STEP = ["table_ptr", "seq_lens_ptr", "query_starts_ptr"]
WIDTH = ["table_stride"]


@triton.jit
def _slots(table_row, start, key_at, is_key, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Return the slots of a tile's keys, counted in tokens from the pool's first."""
    if PAGE_SIZE % TILE == 0:
        # The whole tile lies in one page: tiles begin at multiples of their size.
        page = tl.load(table_row + start // PAGE_SIZE).to(tl.int64)
        slots = page * PAGE_SIZE + start % PAGE_SIZE + tl.arange(0, TILE)
    else:
        pages = tl.load(table_row + key_at // PAGE_SIZE, mask=is_key, other=0).to(tl.int64)
        slots = pages * PAGE_SIZE + key_at % PAGE_SIZE
    return slots


@triton.jit
def _load(base, slots, slot_stride, dims, is_key, HEAD_DIM: tl.constexpr, dtype: tl.constexpr):
    """Return a tile `[keys, dims]`, with zeros where there is no key.

    The memory there may hold NaN, which a weight of zero keeps.
    """
    mask = is_key[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(base + slots[:, None] * slot_stride + dims[None, :], mask=mask, other=0.0).to(
        dtype
    )


@triton.jit
def _fold(q, k, v, is_seen, scale_log2, acc, peak, total):
    """Add one tile of keys to an online softmax (arXiv:2205.14135)."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    scores = tl.where(is_seen, scores, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # For a query without a key so far, minus infinity less minus infinity would be NaN.
    base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    weights = tl.exp2(scores - base[:, None])
    kept = tl.exp2(peak - base)
    acc = acc * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return acc, new_peak, total * kept + tl.sum(weights, 1)


@triton.jit(do_not_specialize=WIDTH, do_not_specialize_on_alignment=OF_A_STEP)
def decode_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    table_ptr,
    seq_lens_ptr,
    query_starts_ptr,
    scale_log2,
    window,
    q_token_stride,
    q_head_stride,
    slot_stride,
    table_stride,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Attend one row's only query to one share of its keys, for all query heads of a KV head.

    Grid: rows, KV heads, splits. Rows with more queries are skipped. With one split the result
    is `out` `[tokens, heads, HEAD_DIM]`; with more, `partial` `[rows, heads, splits, HEAD_DIM]` and
    `lse` (base 2) `[rows, heads, splits]`, for `combine_kernel`.
    """
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(query_starts_ptr + row)
    if tl.load(query_starts_ptr + row + 1) - token != 1:
        return
    num_keys = tl.load(seq_lens_ptr + row)
    first_key = tl.maximum(num_keys - window, 0)
    first = first_key // TILE * TILE
    tiles_each = tl.cdiv(tl.cdiv(num_keys - first, TILE), NUM_SPLITS)
    begin = first + split * tiles_each * TILE
    end = tl.minimum(begin + tiles_each * TILE, num_keys)

    members = tl.arange(0, GROUP_BLOCK)
    dims = tl.arange(0, DIM_BLOCK)
    heads = kv_head * GROUP + members
    mask = (members < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    num_heads = tl.num_programs(1) * GROUP
    split_at = (row.to(tl.int64) * num_heads + heads) * NUM_SPLITS + split
    if begin >= end:
        # The row is too short for so many splits.
        tl.store(lse_ptr + split_at, -float("inf"), mask=members < GROUP)
        return

    q_at = token.to(tl.int64) * q_token_stride + heads[:, None] * q_head_stride + dims[None, :]
    q = tl.load(q_ptr + q_at, mask=mask, other=0.0).to(DOT_DTYPE)
    acc = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
    peak = tl.full([GROUP_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    table_row = table_ptr + row.to(tl.int64) * table_stride
    head_at = kv_head * HEAD_DIM
    for start in range(begin, end, TILE):
        key_at = start + tl.arange(0, TILE)
        is_key = (key_at >= first_key) & (key_at < end)
        slots = _slots(table_row, start, key_at, is_key, PAGE_SIZE, TILE)
        k = _load(keys_ptr + head_at, slots, slot_stride, dims, is_key, HEAD_DIM, DOT_DTYPE)
        v = _load(values_ptr + head_at, slots, slot_stride, dims, is_key, HEAD_DIM, DOT_DTYPE)
        acc, peak, total = _fold(q, k, v, is_key[None, :], scale_log2, acc, peak, total)

    acc = acc / total[:, None]
    if NUM_SPLITS == 1:
        out_at = (token.to(tl.int64) * num_heads + heads)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(partial_ptr + split_at[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
        tl.store(lse_ptr + split_at, peak + tl.log2(total), mask=members < GROUP)


@triton.jit(do_not_specialize_on_alignment=OF_A_STEP)
def combine_kernel(
    partial_ptr,
    lse_ptr,
    out_ptr,
    query_starts_ptr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    """Combine the splits of one head of one row by their log-sum-exp. Grid: rows, heads."""
    row, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    token = tl.load(query_starts_ptr + row)
    if tl.load(query_starts_ptr + row + 1) - token != 1:
        return
    splits, dims = tl.arange(0, NUM_SPLITS), tl.arange(0, DIM_BLOCK)
    split_at = (row.to(tl.int64) * num_heads + head) * NUM_SPLITS + splits
    lse = tl.load(lse_ptr + split_at)
    is_dim = dims < HEAD_DIM
    # A split without keys has written no result, so it is not read.
    mask = (lse > -float("inf"))[:, None] & is_dim[None, :]
    partial_at = split_at[:, None] * HEAD_DIM + dims[None, :]
    partial = tl.load(partial_ptr + partial_at, mask=mask, other=0.0)
    weights = tl.exp2(lse - tl.max(lse, 0))
    result = tl.sum(weights[:, None] * partial, 0) / tl.sum(weights, 0)
    out_at = (token.to(tl.int64) * num_heads + head) * HEAD_DIM + dims
    tl.store(out_ptr + out_at, result.to(out_ptr.dtype.element_ty), mask=is_dim)


@triton.jit(do_not_specialize=WIDTH, do_not_specialize_on_alignment=OF_A_STEP)
def prompt_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    out_ptr,
    table_ptr,
    seq_lens_ptr,
    query_starts_ptr,
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
    QUERY_TILE: tl.constexpr,
    TILE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Attend a tile of one row's queries, for one head.

    Grid: tiles of the longest row, heads, rows. Rows with one query are left to `decode_kernel`.
    """
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_token = tl.load(query_starts_ptr + row)
    count = tl.load(query_starts_ptr + row + 1) - first_token
    if (count == 1) | (tile * QUERY_TILE >= count):
        return
    past = tl.load(seq_lens_ptr + row) - count
    queries = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    query_at = past + queries
    dims = tl.arange(0, DIM_BLOCK)
    mask = (queries < count)[:, None] & (dims < HEAD_DIM)[None, :]
    tokens = (first_token + queries).to(tl.int64)
    q_at = tokens[:, None] * q_token_stride + head * q_head_stride + dims[None, :]
    q = tl.load(q_ptr + q_at, mask=mask, other=0.0).to(DOT_DTYPE)

    acc = tl.zeros([QUERY_TILE, DIM_BLOCK], tl.float32)
    peak = tl.full([QUERY_TILE], -float("inf"), tl.float32)
    total = tl.zeros([QUERY_TILE], tl.float32)
    table_row = table_ptr + row.to(tl.int64) * table_stride
    head_at = head // GROUP * HEAD_DIM
    first_key = tl.maximum(past + tile * QUERY_TILE - window + 1, 0)
    begin = first_key // TILE * TILE
    end = past + tl.minimum((tile + 1) * QUERY_TILE, count)
    for start in range(begin, end, TILE):
        key_at = start + tl.arange(0, TILE)
        is_key = (key_at >= first_key) & (key_at < end)
        slots = _slots(table_row, start, key_at, is_key, PAGE_SIZE, TILE)
        k = _load(keys_ptr + head_at, slots, slot_stride, dims, is_key, HEAD_DIM, DOT_DTYPE)
        v = _load(values_ptr + head_at, slots, slot_stride, dims, is_key, HEAD_DIM, DOT_DTYPE)
        back = query_at[:, None] - key_at[None, :]
        is_seen = (back >= 0) & (back < window)
        acc, peak, total = _fold(q, k, v, is_seen, scale_log2, acc, peak, total)

    num_heads = tl.num_programs(1)
    out_at = (tokens * num_heads + head)[:, None] * HEAD_DIM + dims[None, :]
    # Past the row's last query there may be no key.
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + out_at, result.to(out_ptr.dtype.element_ty), mask=mask)
