"""The small operations between matrix products, in Triton. Needs triton.

Each is one pass over memory with float32 inside. Knows nothing of torch or of layers
(`ops.py`); a program takes one row, or a block of it.
"""

from __future__ import annotations

import triton
import triton.language as tl


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


# These begin elsewhere in each step's arrays; by default Triton would compile for each alignment,
# while requests wait.
@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "kv_slots_ptr"])
def rope_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    cos_sin_ptr,
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
):
    """Rotate q in place, and k: in place too, or, where `STORES`, into its page, as v goes to its.

    Grid: tokens, blocks of `HEADS_EACH` heads: those of q, then those of k, then (`STORES`) of v.
    A thread reads both halves before it writes them, so in place no thread reads rotated values.
    """
    Q_BLOCKS: tl.constexpr = (NUM_HEADS + HEADS_EACH - 1) // HEADS_EACH
    KV_BLOCKS: tl.constexpr = (NUM_KV_HEADS + HEADS_EACH - 1) // HEADS_EACH
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * 2 * HALF
    halves = tl.arange(0, HALF_BLOCK)
    members = tl.arange(0, HEADS_EACH)
    if block < Q_BLOCKS:
        heads = block * HEADS_EACH + members
        mask = (heads < NUM_HEADS)[:, None] & (halves < HALF)[None, :]
        at = token * q_token_stride + heads[:, None] * q_head_stride + halves[None, :]
        first, second = _rotated(q_ptr, at, cos_ptr, halves, mask, HALF)
        tl.store(q_ptr + at, first.to(q_ptr.dtype.element_ty), mask=mask)
        tl.store(q_ptr + at + HALF, second.to(q_ptr.dtype.element_ty), mask=mask)
        return
    heads = (block - Q_BLOCKS) % KV_BLOCKS * HEADS_EACH + members
    is_head = (heads < NUM_KV_HEADS)[:, None]
    dims = tl.arange(0, DIM_BLOCK)
    if STORES:
        page_at = tl.load(kv_slots_ptr + token) * slot_stride + heads[:, None] * HEAD_DIM
    if block < Q_BLOCKS + KV_BLOCKS:
        row = token * k_token_stride + heads[:, None] * k_head_stride
        mask = is_head & (halves < HALF)[None, :]
        first, second = _rotated(k_ptr, row + halves[None, :], cos_ptr, halves, mask, HALF)
        if STORES:
            to = keys_ptr + page_at
            is_rest = is_head & (dims >= 2 * HALF)[None, :] & (dims < HEAD_DIM)[None, :]
            rest = tl.load(k_ptr + row + dims[None, :], mask=is_rest, other=0.0)
            tl.store(to + dims[None, :], rest.to(to.dtype.element_ty), mask=is_rest)
        else:
            to = k_ptr + row
        tl.store(to + halves[None, :], first.to(to.dtype.element_ty), mask=mask)
        tl.store(to + HALF + halves[None, :], second.to(to.dtype.element_ty), mask=mask)
    elif STORES:
        is_dim = is_head & (dims < HEAD_DIM)[None, :]
        v_at = token * v_token_stride + heads[:, None] * v_head_stride + dims[None, :]
        v = tl.load(v_ptr + v_at, mask=is_dim, other=0.0)
        values_at = page_at + dims[None, :]
        tl.store(values_ptr + values_at, v.to(values_ptr.dtype.element_ty), mask=is_dim)
