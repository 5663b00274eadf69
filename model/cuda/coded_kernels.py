"""The matrix product with weights in codes, in Triton: integers of 4 or 8 bits, floats of 8 bits.

A weight is scale * (code - zero point), with a scale for each output and group of inputs. Codes
less zero points are small integers, which 16 bits hold exactly: the scale is applied to a group's
sum in float32, and no weight is rounded. Needs triton; knows nothing of torch or of files
(`coded_linear.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.attention.triton_code_kernels import from_float8


@triton.jit(do_not_specialize=["num_rows"])
def coded_product_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    NUM_INPUTS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    GROUP_INPUTS: tl.constexpr,
    KIND: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply `[rows, inputs]` by the transposed weights. Grid: blocks of rows, and of outputs.

    Codes are bytes `[inputs, outputs]`. Of kind "nibbles" they are `[inputs / 2, outputs]`: the
    bytes of a block of inputs hold its first half in their low bits, its second half in their high
    bits. Scales and zero points are `[groups, outputs]`; without `HAS_ZEROS` the zero points
    of integers are the middle of their range. Blocks divide inputs and groups.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_row, is_output = rows < num_rows, outputs < NUM_OUTPUTS
    PART: tl.constexpr = BLOCK // 2 if KIND == "nibbles" else BLOCK
    places = tl.arange(0, PART)
    x_at = x_ptr + rows.to(tl.int64)[:, None] * NUM_INPUTS + places[None, :]
    codes_at = codes_ptr + places.to(tl.int64)[:, None] * NUM_OUTPUTS + outputs[None, :]
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for block in range(NUM_INPUTS // BLOCK):
        group_at = block * BLOCK // GROUP_INPUTS * NUM_OUTPUTS + outputs
        x = tl.load(x_at + block * BLOCK, mask=is_row[:, None], other=0.0)
        codes = tl.load(codes_at, mask=is_output[None, :], other=0)
        codes_at += PART * NUM_OUTPUTS
        if KIND == "floats":
            part = tl.dot(x, from_float8(codes).to(x.dtype), input_precision="ieee")
        else:
            zeros = 8.0 if KIND == "nibbles" else 128.0
            if HAS_ZEROS:
                zeros = tl.load(zeros_ptr + group_at, mask=is_output, other=0).to(tl.float32)
                zeros = zeros[None, :]
            if KIND == "nibbles":
                second = tl.load(x_at + block * BLOCK + PART, mask=is_row[:, None], other=0.0)
                low = ((codes & 15).to(tl.float32) - zeros).to(x.dtype)
                high = ((codes >> 4).to(tl.float32) - zeros).to(x.dtype)
                part = tl.dot(x, low, input_precision="ieee")
                part = tl.dot(second, high, acc=part, input_precision="ieee")
            else:
                centred = (codes.to(tl.float32) - zeros).to(x.dtype)
                part = tl.dot(x, centred, input_precision="ieee")
        scales = tl.load(scales_ptr + group_at, mask=is_output, other=0.0)
        total += part * scales[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + rows.to(tl.int64)[:, None] * NUM_OUTPUTS + outputs[None, :]
    mask = is_row[:, None] & is_output[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=mask)
