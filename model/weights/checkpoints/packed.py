"""The format `pack-quantized` of compressed-tensors: signed integers in words.

Codes are `[outputs, inputs / 8]` in four bits, each plus the middle of its range. Zero points are
packed likewise, but along the outputs: `[outputs / 8, groups]`; that of a whole tensor is a byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from model.formats.quantization import MatrixFormat
from model.weights.checkpoints.coded_matrix import CodedMatrix
from model.weights.checkpoints.group_order import mixed_groups
from model.weights.checkpoints.interface import (
    FLOATS,
    PartError,
    PartSpec,
    block_of,
    num_groups,
    scale_shapes,
)
from model.weights.checkpoints.words import unpack


class PackedLayout:
    """See `MatrixLayout`."""

    codes = "weight_packed"
    codes_dtype_names: tuple[str, ...] = ("I32",)
    other_parts: tuple[str, ...] = (
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
    )

    def shape(self, codes_shape: tuple[int, int], bits: int) -> tuple[int, int]:
        """See `MatrixLayout`."""
        num_outputs, num_words = codes_shape
        return num_outputs, num_words * (32 // bits)

    def parts(self, shape: tuple[int, int], fmt: MatrixFormat) -> Iterator[PartSpec]:
        """See `MatrixLayout`."""
        yield PartSpec(("weight_scale",), FLOATS, scale_shapes(shape, fmt))
        yield PartSpec(("weight_shape",), ("I64", "I32"), ((2,),), is_required=False)
        yield PartSpec(("weight_g_idx",), ("I32", "I64"), ((shape[1],),), is_required=False)
        if fmt.is_symmetric:
            return
        if fmt.block == (None, None):
            yield PartSpec(("weight_zero_point",), ("I8",), scale_shapes(shape, fmt))
        else:
            blocks, groups = num_groups(shape, fmt)
            num_words = -(-blocks * fmt.bits // 32)
            yield PartSpec(("weight_zero_point",), ("I32",), ((num_words, groups),))

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], fmt: MatrixFormat
    ) -> CodedMatrix:
        """See `MatrixLayout`."""
        stated = parts.get("weight_shape")
        if stated is not None and stated.tolist() != list(shape):
            raise PartError(f"weight_shape is {stated.tolist()}, but its words hold {list(shape)}")
        grid, block = num_groups(shape, fmt), block_of(shape, fmt)
        zeros = parts.get("weight_zero_point")
        if zeros is not None and zeros.dtype == torch.int32:
            zeros = _signed(zeros.T, fmt.bits)[:, : grid[0]].T
        return CodedMatrix(
            codes=_signed(parts["weight_packed"], fmt.bits),
            scales=parts["weight_scale"].float().view(grid),
            zeros=None if zeros is None else zeros.float().reshape(grid),
            block=block,
            bits=fmt.bits,
            group_of_input=mixed_groups(parts.get("weight_g_idx"), block[1], "weight_g_idx"),
        )


def _signed(words: Tensor, bits: int) -> Tensor:
    """Return the int8 codes of words."""
    return (unpack(words, bits) - (1 << (bits - 1))).view(torch.int8)
