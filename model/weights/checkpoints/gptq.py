"""GPTQ as AutoGPTQ and GPTQModel save it (arXiv:2210.17323).

Codes are transposed, `[inputs / 8, outputs]` in four bits: each word has inputs that follow each
other. Zero points are `[groups, outputs / 8]`. The first version of the format stores them less
one. Its writers subtract from whole words, so a zero point of 0 borrows from its neighbour; the
addition here carries.

With `desc_act`, `g_idx` has the group of each input, in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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
)
from model.weights.checkpoints.words import unpack

#: One in each code of a word.
_ONES = {4: 0x11111111, 8: 0x01010101}


class GptqLayout:
    """See `MatrixLayout`."""

    codes = "qweight"
    codes_dtype_names: tuple[str, ...] = ("I32",)
    other_parts: tuple[str, ...] = ("qzeros", "scales", "g_idx")

    def __init__(self, *, zeros_are_less_one: bool) -> None:
        self._zeros_are_less_one = zeros_are_less_one

    def shape(self, codes_shape: tuple[int, int], bits: int) -> tuple[int, int]:
        """See `MatrixLayout`."""
        num_words, num_outputs = codes_shape
        return num_outputs, num_words * (32 // bits)

    def parts(self, shape: tuple[int, int], fmt: MatrixFormat) -> Iterator[PartSpec]:
        """See `MatrixLayout`."""
        if shape[0] * fmt.bits % 32:
            raise PartError(f"the zero points of {shape[0]} outputs fill no whole words")
        groups, num_words = num_groups(shape, fmt)[1], shape[0] * fmt.bits // 32
        yield PartSpec(("qzeros",), ("I32",), ((groups, num_words),))
        yield PartSpec(("scales",), FLOATS, ((groups, shape[0]),))
        yield PartSpec(("g_idx",), ("I32", "I64"), ((shape[1],),), is_required=False)

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], fmt: MatrixFormat
    ) -> CodedMatrix:
        """See `MatrixLayout`."""
        zeros = parts["qzeros"]
        if self._zeros_are_less_one:
            zeros = zeros + _ONES[fmt.bits]
        block = block_of(shape, fmt)
        return CodedMatrix(
            codes=unpack(parts["qweight"].T, fmt.bits),
            scales=parts["scales"].float().T.contiguous(),
            zeros=unpack(zeros, fmt.bits).float().T.contiguous(),
            block=block,
            bits=fmt.bits,
            group_of_input=mixed_groups(parts.get("g_idx"), block[1], "g_idx"),
        )
