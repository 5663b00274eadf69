"""AWQ as AutoAWQ's GEMM version saves it (arXiv:2306.00978).

Matrices are transposed, `[inputs, outputs / 8]`: each word has eight outputs of one input, from the
lowest bits on those at 0, 2, 4, 6, 1, 3, 5 and 7. Zero points are packed in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from model.formats.quantization import MatrixFormat
from model.weights.checkpoints.coded_matrix import CodedMatrix
from model.weights.checkpoints.interface import FLOATS, PartSpec, block_of, num_groups

#: The place within a word of each of its eight outputs.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class AwqLayout:
    """See `MatrixLayout`."""

    codes = "qweight"
    codes_dtype_names: tuple[str, ...] = ("I32",)
    other_parts: tuple[str, ...] = ("qzeros", "scales")

    def shape(self, codes_shape: tuple[int, int], bits: int) -> tuple[int, int]:
        """See `MatrixLayout`."""
        num_inputs, num_words = codes_shape
        return num_words * (32 // bits), num_inputs

    def parts(self, shape: tuple[int, int], fmt: MatrixFormat) -> Iterator[PartSpec]:
        """See `MatrixLayout`."""
        groups, num_words = num_groups(shape, fmt)[1], shape[0] * fmt.bits // 32
        yield PartSpec(("qzeros",), ("I32",), ((groups, num_words),))
        yield PartSpec(("scales",), FLOATS, ((groups, shape[0]),))

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], fmt: MatrixFormat
    ) -> CodedMatrix:
        """See `MatrixLayout`."""
        return CodedMatrix(
            codes=_unpacked(parts["qweight"]),
            scales=parts["scales"].float().T.contiguous(),
            zeros=_unpacked(parts["qzeros"]).float(),
            block=block_of(shape, fmt),
            bits=fmt.bits,
        )


def _unpacked(words: Tensor) -> Tensor:
    """Return the codes `[outputs, rows]` of words `[rows, outputs / 8]`.

    The words' bytes are taken apart first: so each step reads and writes long rows, seven times as
    fast as sorting codes that lie side by side.
    """
    num_rows, num_words = words.shape
    octets = words.T.contiguous().view(torch.uint8).view(num_words, num_rows, 4)
    planes = octets.permute(2, 0, 1).contiguous()
    codes = torch.empty(num_words, len(_PLACES), num_rows, dtype=torch.uint8)
    for output, place in enumerate(_PLACES):
        plane = planes[place // 2]
        codes[:, output] = plane >> 4 if place % 2 else plane & 15
    return codes.view(-1, num_rows)
