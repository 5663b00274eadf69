"""Codes of keys and values in Triton: encoding vectors into pages, reading tiles. Needs triton.

Encoding writes the bytes that `model/kv/codes.py` defines, so it repeats its operations in their
order, in float32; no product may be fused with a sum. Rotation too has the bits of its definition:
the sums of a product of matrices may depend on the number of vectors. Numbers of bfloat16 are int16
here, by their bits. A KIND of pages is "floats" or the name of a format with codes. Knows nothing
of torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Bits of float32: of the exponent, which are all set in infinities and NaN; of NaN.
_EXPONENT = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FC00000)
#: Adding and subtracting 1.5 * 2**23 rounds a small float32 to an integer, half to even.
_ROUNDING = tl.constexpr(12582912.0)


@triton.jit
def from_float8(codes):
    """Return e4m3 bytes as float16: exponent and fraction move into place, 2**8 too small.

    By integers, since Triton converts this type only for sm_89 and later. NaN becomes 480.
    """
    wide = codes.to(tl.int16)
    moved = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return moved.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def _to_float8(x):
    """Return float32 within 448 as e4m3 bytes, rounded half to even."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Three bits of the fraction stay; the bias of the exponent changes from 127 to 7.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 codes are multiples of 2**-9, the last bit of a float32 between 2**14 and 2**15.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return (tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _bfloat16_up(x):
    """Return float32 rounded to bfloat16 towards +inf, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    # Cutting off the lower bits of a negative number is up already.
    return (tl.where(bits < 0, bits, bits + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _is_finite(x):
    """Return whether all elements are finite."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.max(((bits & _EXPONENT) == _EXPONENT).to(tl.int32), 0) == 0


@triton.jit
def _steps(x, scale):
    """Return a vector divided by its scale; zeros where that is zero or NaN."""
    is_scale = scale > 0.0
    return tl.where(is_scale, tl.div_rn(x, tl.where(is_scale, scale, 1.0)), 0.0)


@triton.jit
def _hadamard(x, LENGTH: tl.constexpr, STAGES: tl.constexpr, FACTOR: tl.constexpr):
    """Return `[LENGTH]` times an orthonormal Hadamard matrix of 2**STAGES rows, block by block."""
    for stage in tl.static_range(STAGES):
        # Elements 2**stage apart become sum and difference.
        pairs = tl.reshape(x, (LENGTH // (2 << stage), 2, 1 << stage))
        left, right = tl.split(tl.permute(pairs, (0, 2, 1)))
        turned = tl.permute(tl.join(left + right, left - right), (0, 2, 1))
        x = tl.reshape(turned, (LENGTH,))
    return x * FACTOR


@triton.jit
def _store_scale(ptr, scale, is_finite):
    bits = tl.where(is_finite, scale.to(tl.int32, bitcast=True), _NAN)
    tl.store(ptr, (bits >> 16).to(tl.int16))


@triton.jit
def _store_vector(
    x_ptr,
    codes_ptr,
    scales_ptr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    STAGES: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Encode the vector at `x_ptr`; its codes and scales go to the other two places."""
    dims = tl.arange(0, DIM_BLOCK)
    is_dim = dims < HEAD_DIM
    x = tl.load(x_ptr + dims, mask=is_dim, other=0.0).to(tl.float32)
    is_finite = _is_finite(x)
    x = tl.where(is_finite, x, 0.0)
    if KIND != "fp8":
        x = _hadamard(x, DIM_BLOCK, STAGES, FACTOR)
        is_finite = is_finite & _is_finite(x)
        x = tl.where(is_finite, x, 0.0)
    if KIND == "int4":
        lowest = tl.min(tl.where(is_dim, x, float("inf")), 0)
        highest = tl.max(tl.where(is_dim, x, -float("inf")), 0)
        least = -_bfloat16_up(-lowest) + 0.0
        spread = highest - least
        is_finite = is_finite & ((spread.to(tl.int32, bitcast=True) & _EXPONENT) != _EXPONENT)
        least = tl.where(is_finite, least, 0.0)
        scale = tl.where(is_finite, _bfloat16_up(tl.div_rn(spread, 15.0)), 0.0)
        steps = _steps(x - least, scale)
        rounded = tl.minimum(tl.maximum((steps + _ROUNDING) - _ROUNDING, 0.0), 15.0)
        low, high = tl.split(tl.reshape(rounded.to(tl.int32), (DIM_BLOCK // 2, 2)))
        places = tl.arange(0, DIM_BLOCK // 2)
        codes = (low | (high << 4)).to(tl.uint8)
        tl.store(codes_ptr + places, codes, mask=places < HEAD_DIM // 2)
        tl.store(scales_ptr + 1, (least.to(tl.int32, bitcast=True) >> 16).to(tl.int16))
    else:
        LARGEST: tl.constexpr = 127.0 if KIND == "int8" else 448.0
        most = tl.max(tl.abs(x), 0)
        scale = tl.where(is_finite, _bfloat16_up(tl.div_rn(most, LARGEST)), 0.0)
        steps = tl.minimum(tl.maximum(_steps(x, scale), -LARGEST), LARGEST)
        if KIND == "int8":
            tl.store(codes_ptr + dims, ((steps + _ROUNDING) - _ROUNDING).to(tl.int8), mask=is_dim)
        else:
            tl.store(codes_ptr + dims, _to_float8(steps), mask=is_dim)
    _store_scale(scales_ptr, scale, is_finite)


@triton.jit(do_not_specialize_on_alignment=["kv_slots_ptr"])
def store_kernel(
    k_ptr,
    v_ptr,
    kv_slots_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    STAGES: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Encode keys and values `[tokens, heads, HEAD_DIM]` into their slots.

    Grid: tokens, heads, 2 (keys, values). Pages are contiguous; pairs of codes are bytes and scales
    pairs for "int4".
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    PARTS: tl.constexpr = 2 if KIND == "int4" else 1
    vector = tl.load(kv_slots_ptr + token) * tl.num_programs(1) + head
    codes_at, scales_at = vector * (HEAD_DIM // PARTS), vector * PARTS
    if tl.program_id(2) == 0:
        _store_vector(
            k_ptr + token * k_token_stride + head * k_head_stride,
            keys_ptr + codes_at,
            key_scales_ptr + scales_at,
            HEAD_DIM,
            DIM_BLOCK,
            KIND,
            STAGES,
            FACTOR,
        )
    else:
        _store_vector(
            v_ptr + token * v_token_stride + head * v_head_stride,
            values_ptr + codes_at,
            value_scales_ptr + scales_at,
            HEAD_DIM,
            DIM_BLOCK,
            KIND,
            STAGES,
            FACTOR,
        )


@triton.jit
def rotate_kernel(
    x_ptr,
    out_ptr,
    x_token_stride,
    x_head_stride,
    NUM_HEADS: tl.constexpr,
    HEADS_EACH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Write `[tokens, NUM_HEADS, HEAD_DIM]` after `_hadamard` to other memory, contiguous.

    Grid: tokens, blocks of `HEADS_EACH` heads.
    """
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS_EACH + tl.arange(0, HEADS_EACH)
    dims = tl.arange(0, DIM_BLOCK)
    mask = (heads < NUM_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    x_at = token * x_token_stride + heads[:, None] * x_head_stride + dims[None, :]
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    # No block of the matrix reaches into the next head.
    LENGTH: tl.constexpr = HEADS_EACH * DIM_BLOCK
    turned = _hadamard(tl.reshape(x, (LENGTH,)), LENGTH, STAGES, FACTOR)
    turned = tl.reshape(turned, (HEADS_EACH, DIM_BLOCK)).to(out_ptr.dtype.element_ty)
    out_at = (token * NUM_HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out_ptr + out_at, turned, mask=mask)


@triton.jit
def load_tile(
    base,
    slots,
    slot_stride,
    is_key,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    dtype: tl.constexpr,
):
    """Return a tile `[keys, DIM_BLOCK]` of elements or codes, with zeros where there is no key.

    The memory there may hold NaN, which a weight of zero keeps.
    """
    PARTS: tl.constexpr = 2 if KIND == "int4" else 1
    places = tl.arange(0, DIM_BLOCK // PARTS)
    mask = is_key[:, None] & (places < HEAD_DIM // PARTS)[None, :]
    tile = tl.load(base + slots[:, None] * slot_stride + places[None, :], mask=mask, other=0)
    if KIND == "int4":
        tile = tl.interleave(tile & 15, tile >> 4)
    elif KIND == "fp8":
        tile = from_float8(tile)
    return tile.to(dtype)


@triton.jit
def load_scales(base, at, is_key):
    """Return a bfloat16 number of each key as float32, zero where there is no key."""
    bits = tl.load(base + at, mask=is_key, other=0).to(tl.int32) << 16
    return bits.to(tl.float32, bitcast=True)
