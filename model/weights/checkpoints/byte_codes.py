"""Codes of one byte under the plain name: 8-bit integers, or 8-bit floats.

They are `[outputs, inputs]`. This is `int-quantized` and `float-quantized` of compressed-tensors,
and the fp8 of DeepSeek, which calls its scales `weight_scale_inv`: they are factors all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from model.formats.quantization import MatrixFormat
from model.weights.checkpoints.coded_matrix import CodedMatrix
from model.weights.checkpoints.interface import (
    FLOATS,
    PartError,
    PartSpec,
    block_of,
    num_groups,
    scale_shapes,
)


class ByteLayout:
    """See `MatrixLayout`."""

    codes = "weight"

    other_parts: tuple[str, ...] = ("weight_scale", "weight_scale_inv", "weight_zero_point")

    def __init__(self, dtype_name: str) -> None:
        self.codes_dtype_names: tuple[str, ...] = (dtype_name,)

    def shape(self, codes_shape: tuple[int, int], bits: int) -> tuple[int, int]:  # noqa: ARG002 - the interface's
        """See `MatrixLayout`."""
        return codes_shape

    def parts(self, shape: tuple[int, int], fmt: MatrixFormat) -> Iterator[PartSpec]:
        """See `MatrixLayout`."""
        shapes = scale_shapes(shape, fmt)
        yield PartSpec(("weight_scale", "weight_scale_inv"), (*FLOATS, "F8_E8M0"), shapes)
        if not fmt.is_symmetric:
            yield PartSpec(("weight_zero_point",), ("I8",), shapes)

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], fmt: MatrixFormat
    ) -> CodedMatrix:
        """See `MatrixLayout`."""
        codes, middle = parts["weight"], 1 << (fmt.bits - 1)
        if fmt.bits < 8 and bool(((codes < -middle) | (codes >= middle)).any()):
            raise PartError(f"it has codes of more than {fmt.bits} bits")
        grid = num_groups(shape, fmt)
        zeros = parts.get("weight_zero_point")
        return CodedMatrix(
            codes=codes,
            scales=parts["weight_scale"].float().view(grid),
            zeros=None if zeros is None else zeros.float().view(grid),
            block=block_of(shape, fmt),
            bits=fmt.bits,
        )
