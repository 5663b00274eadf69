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

from model.attention.triton_code_kernels import load_scales, load_tile

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
def _fold(
    q,
    q_sum,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    head,
    num_heads,
    slots,
    slot_stride,
    is_key,
    is_seen,
    scale_log2,
    acc,
    shift,
    peak,
    total,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
):
    """Add one tile of a head's keys to an online softmax (arXiv:2205.14135).

    Scales multiply sums of products with codes, or the weights of values. `shift` is the weighted
    sum of the minima of "int4", which all elements of a value have; `q_sum` meets those of keys.
    """
    PARTS: tl.constexpr = 2 if KIND == "int4" else 1
    elements_at = head * (HEAD_DIM // PARTS)
    scales_at = (slots * num_heads + head) * PARTS
    k = load_tile(
        keys_ptr + elements_at, slots, slot_stride, is_key, HEAD_DIM, DIM_BLOCK, KIND, DOT_DTYPE
    )
    v = load_tile(
        values_ptr + elements_at,
        slots,
        slot_stride,
        is_key,
        HEAD_DIM,
        DIM_BLOCK,
        KIND,
        WEIGHT_DTYPE,
    )
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if KIND != "floats":
        scores *= load_scales(key_scales_ptr, scales_at, is_key)[None, :]
    if KIND == "int4":
        scores += q_sum[:, None] * load_scales(key_scales_ptr, scales_at + 1, is_key)[None, :]
    scores = tl.where(is_seen, scores * scale_log2, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # For a query without a key so far, minus infinity less minus infinity would be NaN.
    base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    weights = tl.exp2(scores - base[:, None])
    kept = tl.exp2(peak - base)
    total = total * kept + tl.sum(weights, 1)
    if KIND == "int4":
        least = load_scales(value_scales_ptr, scales_at + 1, is_key)
        shift = shift * kept + tl.sum(weights * least[None, :], 1)
    if KIND != "floats":
        # A scale may be NaN, which only the queries that see the key may take over.
        weights *= load_scales(value_scales_ptr, scales_at, is_key)[None, :]
        weights = tl.where(is_seen, weights, 0.0)
    acc = acc * kept[:, None] + tl.dot(weights.to(WEIGHT_DTYPE), v, input_precision="ieee")
    return acc, shift, new_peak, total


@triton.jit(do_not_specialize=WIDTH, do_not_specialize_on_alignment=OF_A_STEP)
def decode_kernel(
    q_ptr,
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
    first_key = tl.maximum(past - window + 1, 0)
    first_tile = first_key // TILE
    begin = (first_tile + ((split - first_tile) & (NUM_SPLITS - 1))) * TILE

    lanes = block * LANES + tl.arange(0, LANES)
    queries, heads = lanes // GROUP, kv_head * GROUP + lanes % GROUP
    query_at = past + queries
    is_lane = queries < count
    dims = tl.arange(0, DIM_BLOCK)
    mask = is_lane[:, None] & (dims < HEAD_DIM)[None, :]
    num_heads = tl.num_programs(1) // BLOCKS * GROUP
    split_at = ((row.to(tl.int64) * QUERIES + queries) * num_heads + heads) * NUM_SPLITS + split
    if begin >= num_keys:
        # The row is too short for so many splits.
        tl.store(lse_ptr + split_at, -float("inf"), mask=is_lane)
        return

    tokens = (first_token + queries).to(tl.int64)
    q_at = tokens[:, None] * q_token_stride + heads[:, None] * q_head_stride + dims[None, :]
    q = tl.load(q_ptr + q_at, mask=mask, other=0.0).to(DOT_DTYPE)
    q_sum = tl.sum(q.to(tl.float32), 1) if KIND == "int4" else 0.0
    acc = tl.zeros([LANES, DIM_BLOCK], tl.float32)
    shift = tl.zeros([LANES], tl.float32)
    peak = tl.full([LANES], -float("inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    table_row = table_ptr + row.to(tl.int64) * table_stride
    for start in range(begin, num_keys, TILE * NUM_SPLITS):
        key_at = start + tl.arange(0, TILE)
        is_key = (key_at >= first_key) & (key_at < num_keys)
        slots = _slots(table_row, start, key_at, is_key, PAGE_SIZE, TILE)
        back = query_at[:, None] - key_at[None, :]
        is_seen = (back >= 0) & (back < window)
        acc, shift, peak, total = _fold(
            q,
            q_sum,
            keys_ptr,
            values_ptr,
            key_scales_ptr,
            value_scales_ptr,
            kv_head,
            num_heads // GROUP,
            slots,
            slot_stride,
            is_key,
            is_seen,
            scale_log2,
            acc,
            shift,
            peak,
            total,
            HEAD_DIM,
            DIM_BLOCK,
            KIND,
            DOT_DTYPE,
            WEIGHT_DTYPE,
        )

    if KIND == "int4":
        acc += shift[:, None]
    # Of this split a query may see no key.
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    if NUM_SPLITS == 1:
        out_at = (tokens * num_heads + heads)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(partial_ptr + split_at[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
        tl.store(lse_ptr + split_at, peak + tl.log2(total), mask=is_lane)


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
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
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
    FEW_QUERIES: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    TILE: tl.constexpr,
    KIND: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
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
    queries = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    query_at = past + queries
    dims = tl.arange(0, DIM_BLOCK)
    mask = (queries < count)[:, None] & (dims < HEAD_DIM)[None, :]
    tokens = (first_token + queries).to(tl.int64)
    q_at = tokens[:, None] * q_token_stride + head * q_head_stride + dims[None, :]
    q = tl.load(q_ptr + q_at, mask=mask, other=0.0).to(DOT_DTYPE)
    q_sum = tl.sum(q.to(tl.float32), 1) if KIND == "int4" else 0.0
    acc = tl.zeros([QUERY_TILE, DIM_BLOCK], tl.float32)
    shift = tl.zeros([QUERY_TILE], tl.float32)
    peak = tl.full([QUERY_TILE], -float("inf"), tl.float32)
    total = tl.zeros([QUERY_TILE], tl.float32)
    table_row = table_ptr + row.to(tl.int64) * table_stride
    first_key = tl.maximum(past + tile * QUERY_TILE - window + 1, 0)
    begin = first_key // TILE * TILE
    num_heads = tl.num_programs(1)
    end = past + tl.minimum((tile + 1) * QUERY_TILE, count)
    for start in range(begin, end, TILE):
        key_at = start + tl.arange(0, TILE)
        is_key = (key_at >= first_key) & (key_at < end)
        slots = _slots(table_row, start, key_at, is_key, PAGE_SIZE, TILE)
        back = query_at[:, None] - key_at[None, :]
        is_seen = (back >= 0) & (back < window)
        acc, shift, peak, total = _fold(
            q,
            q_sum,
            keys_ptr,
            values_ptr,
            key_scales_ptr,
            value_scales_ptr,
            head // GROUP,
            num_heads // GROUP,
            slots,
            slot_stride,
            is_key,
            is_seen,
            scale_log2,
            acc,
            shift,
            peak,
            total,
            HEAD_DIM,
            DIM_BLOCK,
            KIND,
            DOT_DTYPE,
            WEIGHT_DTYPE,
        )

    if KIND == "int4":
        acc += shift[:, None]
    out_at = (tokens * num_heads + head)[:, None] * HEAD_DIM + dims[None, :]
    # Past the row's last query there may be no key.
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + out_at, result.to(out_ptr.dtype.element_ty), mask=mask)
