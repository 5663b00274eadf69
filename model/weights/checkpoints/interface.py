"""The interface to a layout of quantized matrices: its parts, and how they become codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from model.formats.quantization import MatrixFormat
from model.weights.checkpoints.coded_matrix import CodedMatrix

#: Dtypes of scales, by their names in the file.
FLOATS = ("F32", "F16", "BF16")


class PartError(ValueError):
    """A part with values that are not possible; the caller adds the tensor and the file."""


@dataclass(frozen=True, slots=True)
class PartSpec:
    """A tensor that belongs to a quantized matrix."""

    #: Behind the module's name, such as `scales`; several, where writers differ.
    names: tuple[str, ...]
    dtype_names: tuple[str, ...]
    #: Any of these; several, where writers differ in dimensions of size 1.
    shapes: tuple[tuple[int, ...], ...]
    is_required: bool = True


class MatrixLayout(Protocol):
    """The layout of a matrix in parts."""

    #: The part with the codes, and its dtypes.
    codes: str
    codes_dtype_names: tuple[str, ...]
    #: The names of all other parts: where one of them is, the matrix is quantized.
    other_parts: tuple[str, ...]

    def shape(self, codes_shape: tuple[int, int], bits: int) -> tuple[int, int]:
        """Return `[outputs, inputs]` of the matrix from the shape of its codes."""

    def parts(self, shape: tuple[int, int], fmt: MatrixFormat) -> Iterator[PartSpec]:
        """Yield the parts besides the codes of a matrix of this shape. Raises `PartError`."""

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], fmt: MatrixFormat
    ) -> CodedMatrix:
        """Unpack the parts, by their first names; they have been checked. Raises `PartError`."""


def num_groups(shape: tuple[int, int], fmt: MatrixFormat) -> tuple[int, int]:
    """Return the numbers of blocks of outputs and of groups of inputs."""
    outputs, inputs = block_of(shape, fmt)
    return -(-shape[0] // outputs), -(-shape[1] // inputs)


def block_of(shape: tuple[int, int], fmt: MatrixFormat) -> tuple[int, int]:
    """Return the outputs and the inputs that share a scale."""
    outputs, inputs = fmt.block
    return shape[0] if outputs is None else outputs, shape[1] if inputs is None else inputs


def scale_shapes(shape: tuple[int, int], fmt: MatrixFormat) -> tuple[tuple[int, ...], ...]:
    """Return the shapes that writers give to the scales of rows: with or without sizes of 1."""
    blocks, groups = num_groups(shape, fmt)
    if fmt.block == (None, None):
        return (), (1,), (1, 1)
    return ((blocks, groups), (blocks,)) if groups == 1 else ((blocks, groups),)
