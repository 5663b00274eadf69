"""The small operations between matrix products, in Triton. Needs triton.

Each is one pass over memory with float32 inside. Knows nothing of torch or of layers
(`ops.py`); a program takes one row, or a block of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: The bits of a float32 that are all set in infinities and NaN.
_EXPONENT = tl.constexpr(0x7F800000)
#: These begin elsewhere in each step's arrays. By default Triton would compile for each alignment,
#: while requests wait.
OF_A_STEP = ["positions_ptr", "sink_positions_ptr", "kv_slots_ptr"]


@triton.jit
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    eps,
    outer_stride,
    inner_stride,
    NUM_INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Normalize a row: of x or, where `ADDS`, of x plus the residual, stored in the residual.

    Row i of x begins at `i // NUM_INNER * outer_stride + i % NUM_INNER * inner_stride`; rows of the
    residual and of the result are contiguous. Grid: rows.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    x_at = row // NUM_INNER * outer_stride + row % NUM_INNER * inner_stride + columns
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    at = row * WIDTH + columns
    if ADDS:
        x += tl.load(residual_ptr + at, mask=mask, other=0.0)
        tl.store(residual_ptr + at, x, mask=mask)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def silu_and_mul_kernel(gate_up_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply the up half by silu of the gate half. Grid: rows, blocks of a row of the result."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    gate = tl.load(gate_up_ptr + row * 2 * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (row * 2 + 1) * WIDTH + columns, mask=mask, other=0.0)
    result = gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)
    tl.store(out_ptr + row * WIDTH + columns, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotated(x_ptr, at, cos_ptr, halves, first_mask, HALF: tl.constexpr):
    """Return both halves of some heads, rotated."""
    first = tl.load(x_ptr + at, mask=first_mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + at + HALF, mask=first_mask, other=0.0).to(tl.float32)
    is_half = halves < HALF
    cos = tl.load(cos_ptr + halves, mask=is_half, other=0.0)[None, :]
    sin = tl.load(cos_ptr + HALF + halves, mask=is_half, other=0.0)[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _are_finite(x):
    """Return which rows of float32 have no element that is infinite or NaN."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.max(((bits & _EXPONENT) == _EXPONENT).to(tl.int32), 1) == 0


@triton.jit(do_not_specialize_on_alignment=OF_A_STEP)
def rope_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    cos_sin_ptr,
    sink_q_ptr,
    sink_positions_ptr,
    sink_cos_sin_ptr,
    kv_slots_ptr,
    keys_ptr,
    values_ptr,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    slot_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS_EACH: tl.constexpr,
    STORES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Rotate q in place, and k: in place too, or, where `STORES`, into its page, as v goes to its.

    Grid: tokens, blocks of `HEADS_EACH` heads: those of q, then those of k and v. A thread reads
    both halves before it writes them, so in place no thread reads rotated values. A value that is
    not finite is stored as by `PagedAttention.store`.

    Where `HAS_SINKS`, some queries are rotated to `sink_positions` too, into `sink_q`, contiguous.
    """
    Q_BLOCKS: tl.constexpr = (NUM_HEADS + HEADS_EACH - 1) // HEADS_EACH
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * 2 * HALF
    halves, dims = tl.arange(0, HALF_BLOCK), tl.arange(0, DIM_BLOCK)
    members = tl.arange(0, HEADS_EACH)
    if block < Q_BLOCKS:
        heads = block * HEADS_EACH + members
        mask = (heads < NUM_HEADS)[:, None] & (halves < HALF)[None, :]
        row = token * q_token_stride + heads[:, None] * q_head_stride
        at = row + halves[None, :]
        if HAS_SINKS:
            sink_position = tl.load(sink_positions_ptr + token)
            if sink_position >= 0:
                sink_cos_ptr = sink_cos_sin_ptr + sink_position * 2 * HALF
                first, second = _rotated(q_ptr, at, sink_cos_ptr, halves, mask, HALF)
                to = sink_q_ptr + (token * NUM_HEADS + heads)[:, None] * HEAD_DIM
                is_rest = (heads < NUM_HEADS)[:, None] & (dims >= 2 * HALF)[None, :]
                is_rest &= (dims < HEAD_DIM)[None, :]
                rest = tl.load(q_ptr + row + dims[None, :], mask=is_rest, other=0.0)
                tl.store(to + dims[None, :], rest, mask=is_rest)
                tl.store(to + halves[None, :], first.to(to.dtype.element_ty), mask=mask)
                tl.store(to + HALF + halves[None, :], second.to(to.dtype.element_ty), mask=mask)
        first, second = _rotated(q_ptr, at, cos_ptr, halves, mask, HALF)
        tl.store(q_ptr + at, first.to(q_ptr.dtype.element_ty), mask=mask)
        tl.store(q_ptr + at + HALF, second.to(q_ptr.dtype.element_ty), mask=mask)
        return
    heads = (block - Q_BLOCKS) * HEADS_EACH + members
    is_head = (heads < NUM_KV_HEADS)[:, None]
    mask = is_head & (halves < HALF)[None, :]
    row = token * k_token_stride + heads[:, None] * k_head_stride
    first, second = _rotated(k_ptr, row + halves[None, :], cos_ptr, halves, mask, HALF)
    if STORES:
        is_dim = is_head & (dims < HEAD_DIM)[None, :]
        page_at = tl.load(kv_slots_ptr + token) * slot_stride + heads[:, None] * HEAD_DIM
        v_at = token * v_token_stride + heads[:, None] * v_head_stride + dims[None, :]
        v = tl.load(v_ptr + v_at, mask=is_dim, other=0.0).to(values_ptr.dtype.element_ty)
        is_finite = _are_finite(v.to(tl.float32))[:, None]
        tl.store(values_ptr + page_at + dims[None, :], tl.where(is_finite, v, 0.0), mask=is_dim)
        # One element of a key is enough for a score.
        first = tl.where(is_finite, first, float("nan"))
        is_rest = is_dim & (dims >= 2 * HALF)[None, :]
        rest = tl.load(k_ptr + row + dims[None, :], mask=is_rest, other=0.0)
        to = keys_ptr + page_at
        tl.store(to + dims[None, :], rest.to(to.dtype.element_ty), mask=is_rest)
    else:
        to = k_ptr + row
    tl.store(to + halves[None, :], first.to(to.dtype.element_ty), mask=mask)
    tl.store(to + HALF + halves[None, :], second.to(to.dtype.element_ty), mask=mask)
