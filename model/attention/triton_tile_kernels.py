"""Tiles of keys in Triton: which of them a row's queries read, and their online softmax.

The shared part of the kernels in `triton_kernels.py`. Needs triton; knows nothing of torch, nor of
the way in which queries are divided among programs. Scores are in base 2.

A query reads `window` keys back, its own included. With `HAS_VIEWS`, rows have views of their own
(`RowViews`): from the position `sinks + window of the row` on a query is *in view*. It reads the
row's first `sinks` keys, by a query of its own (`sink_q`), and then those behind them in the
nearer of both windows. All other queries read as without views, in the same order. So the sums of a
query depend neither on the queries beside it nor on `HAS_VIEWS`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.attention.triton_code_kernels import load_scales, load_tile

#: Larger than any position.
_NEVER = tl.constexpr(2147483647)


@triton.jit
def row_view(row, row_sinks_ptr, row_windows_ptr, HAS_VIEWS: tl.constexpr):
    """Return a row's sinks, and its first position in view."""
    sinks, bound = 0, _NEVER
    if HAS_VIEWS:
        sinks = tl.load(row_sinks_ptr + row)
        bound = sinks + tl.load(row_windows_ptr + row)
    return sinks, bound


@triton.jit
def _first_seen(query_at, window, sinks, bound, HAS_VIEWS: tl.constexpr):
    """Return the first key that queries read, but for sinks in view.

    It may be negative, and never falls from a query to the next.
    """
    first = query_at - window + 1
    if HAS_VIEWS:
        nearest = tl.minimum(bound - sinks, window)
        in_view = tl.maximum(query_at - nearest + 1, sinks)
        first = tl.where(query_at >= bound, in_view, first)
    return first


@triton.jit
def _first_tile(first_key, split, TILE: tl.constexpr, NUM_SPLITS: tl.constexpr):
    """Return the beginning of the first tile of a split, from the tile of `first_key` on."""
    tile = first_key // TILE
    return (tile + ((split - tile) & (NUM_SPLITS - 1))) * TILE


@triton.jit
def tiles(
    first_query,
    end,
    split,
    window,
    sinks,
    bound,
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_VIEWS: tl.constexpr,
):
    """Return the tiles of a split that the queries from `first_query` to `end` read.

    Of the sinks in view, and of the other keys: where the first tile begins, and the first key.
    Of the sinks also the end: 0 where there are none. Tile i is of split `i % NUM_SPLITS`.
    """
    first_key = tl.maximum(_first_seen(first_query, window, sinks, bound, HAS_VIEWS), 0)
    begin = _first_tile(first_key, split, TILE, NUM_SPLITS)
    sink_begin, first_sink, end_sink = 0, 0, 0
    if HAS_VIEWS:
        # Sinks are as far from a query in view as from the position `bound - 1`. Elsewhere that is
        # the largest integer, beyond which a tile would begin.
        is_in_view = end > bound
        first_sink = tl.where(is_in_view, tl.maximum(bound - window, 0), 0)
        sink_begin = _first_tile(first_sink, split, TILE, NUM_SPLITS)
        end_sink = tl.where(is_in_view, sinks, 0)
    return begin, first_key, sink_begin, first_sink, end_sink


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
def _read(
    q,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    table_row,
    slot_stride,
    head,
    num_heads,
    begin,
    first_key,
    end,
    first_seen,
    last_seen,
    scale_log2,
    acc,
    shift,
    peak,
    total,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
):
    """Add a split's tiles from `begin` on to an online softmax of each query (arXiv:2205.14135).

    Keys from `first_key` to `end` are loaded; each query counts those from its `first_seen` to its
    `last_seen`. A tile without such a key leaves its sums as they are.

    Scales multiply sums of products with codes, or the weights of values. `shift` is the weighted
    sum of the minima of "int4", which all elements of a value have.
    """
    PARTS: tl.constexpr = 2 if KIND == "int4" else 1
    keys_ptr += head * (HEAD_DIM // PARTS)
    values_ptr += head * (HEAD_DIM // PARTS)
    # It meets the minima of the keys.
    q_sum = tl.sum(q.to(tl.float32), 1) if KIND == "int4" else 0.0
    for start in range(begin, end, TILE * NUM_SPLITS):
        key_at = start + tl.arange(0, TILE)
        is_key = (key_at >= first_key) & (key_at < end)
        slots = _slots(table_row, start, key_at, is_key, PAGE_SIZE, TILE)
        is_seen = (key_at[None, :] >= first_seen[:, None]) & (key_at[None, :] <= last_seen[:, None])
        scales_at = (slots * num_heads + head) * PARTS
        k = load_tile(keys_ptr, slots, slot_stride, is_key, HEAD_DIM, DIM_BLOCK, KIND, DOT_DTYPE)
        v = load_tile(
            values_ptr, slots, slot_stride, is_key, HEAD_DIM, DIM_BLOCK, KIND, WEIGHT_DTYPE
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
        # Floats are finite: see `PagedAttention.store`.
        acc = acc * kept[:, None] + tl.dot(weights.to(WEIGHT_DTYPE), v, input_precision="ieee")
        peak = new_peak
    return acc, shift, peak, total


@triton.jit
def attend(
    q_ptr,
    sink_q_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    q_at,
    sink_q_at,
    mask,
    query_at,
    end,
    begin,
    first_key,
    sink_begin,
    first_sink,
    end_sink,
    window,
    sinks,
    bound,
    table_row,
    slot_stride,
    head,
    num_heads,
    scale_log2,
    LANES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    HAS_VIEWS: tl.constexpr,
):
    """Attend the queries at `query_at` of a row to a split's `tiles`, for one KV head.

    Returns `[LANES, DIM_BLOCK]` and the log-sum-exp (base 2), minus infinity of a query that sees
    no key of the split.
    """
    acc = tl.zeros([LANES, DIM_BLOCK], tl.float32)
    shift = tl.zeros([LANES], tl.float32)
    peak = tl.full([LANES], -float("inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    if HAS_VIEWS:
        in_view = query_at >= bound
        sink_q = tl.load(sink_q_ptr + sink_q_at, mask=mask & in_view[:, None], other=0.0)
        acc, shift, peak, total = _read(
            sink_q.to(DOT_DTYPE),
            keys_ptr,
            values_ptr,
            key_scales_ptr,
            value_scales_ptr,
            table_row,
            slot_stride,
            head,
            num_heads,
            sink_begin,
            first_sink,
            end_sink,
            tl.zeros([LANES], tl.int32) + first_sink,
            tl.where(in_view, sinks - 1, -1),
            scale_log2,
            acc,
            shift,
            peak,
            total,
            PAGE_SIZE,
            TILE,
            NUM_SPLITS,
            HEAD_DIM,
            DIM_BLOCK,
            KIND,
            DOT_DTYPE,
            WEIGHT_DTYPE,
        )
    q = tl.load(q_ptr + q_at, mask=mask, other=0.0)
    acc, shift, peak, total = _read(
        q.to(DOT_DTYPE),
        keys_ptr,
        values_ptr,
        key_scales_ptr,
        value_scales_ptr,
        table_row,
        slot_stride,
        head,
        num_heads,
        begin,
        first_key,
        end,
        _first_seen(query_at, window, sinks, bound, HAS_VIEWS),
        query_at,
        scale_log2,
        acc,
        shift,
        peak,
        total,
        PAGE_SIZE,
        TILE,
        NUM_SPLITS,
        HEAD_DIM,
        DIM_BLOCK,
        KIND,
        DOT_DTYPE,
        WEIGHT_DTYPE,
    )
    if KIND == "int4":
        acc += shift[:, None]
    # Of this split, or past the row's last query, there may be no key.
    total = tl.where(total == 0.0, 1.0, total)
    return acc / total[:, None], peak + tl.log2(total)
