"""The interface to weights in files of any format: by canonical name, in blocks of rows.

The canonical names are those of `transformers`' checkpoints. Blocks are read, not mapped: peak
memory is the kept weights plus one block, without the pages of a mapping. A file that is truncated
meanwhile is an error, not a bus error. Knows nothing of formats on either side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

#: Rows are read in blocks of about so many values: small enough to stay in a cache while they
#: are decoded, large enough that Python costs nothing.
BLOCK_VALUES = 2**15
#: Rows that are packed together: blocks of a multiple of it are not copied before.
PACKED_ROWS = 16


class WeightsError(ValueError):
    """Files that do not match the config; the message names tensor, file and shapes."""


class QuantizedWeightsError(WeightsError):
    """Files of a quantized checkpoint, which no other implementation reads."""


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """A matrix in integers: each group of inputs has a scale, and a minimum where there are any.

    A value is `scale * code + minimum`, in float32.
    """

    #: `[outputs, inputs]`: uint8 from 0 to 2**bits - 1, or int8 from -2**(bits - 1).
    codes: Tensor
    #: float32 `[outputs, groups]`; a group has `inputs // groups` inputs.
    scales: Tensor
    #: As `scales`.
    minimums: Tensor | None
    #: 4, 5, 6 or 8.
    bits: int


class WeightSource(Protocol):
    """Tensors by canonical name. Threads may read side by side; nothing is open between reads."""

    #: Of all tensors but unused ones (old checkpoints' rope buffers).
    shapes: dict[str, tuple[int, ...]]
    #: Their files, in the order of reading; empty if there are none.
    paths: tuple[Path, ...]
    #: Names of the formats of integers, "Q4_K and Q6_K", if most values are in any of them.
    own_bits: str

    def describe(self, name: str) -> str:
        """Name a tensor, present or not, for an error: its name in the file, and the file."""

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield consecutive rows of a tensor in any floating dtype, on the CPU."""

    def integers(self, name: str) -> Iterator[QuantizedRows] | None:
        """Yield consecutive rows of a matrix in the integers of its file; at least one row.

        None: it is not kept in integers, or in a form without support; `blocks` has its values.
        """


def read_bytes(file: BufferedReader, offset_bytes: int, num_bytes: int) -> Tensor:
    """Return uint8 `[num_bytes]`. Raises `WeightsError` where the file ends before."""
    found = torch.empty(num_bytes, dtype=torch.uint8)
    file.seek(offset_bytes)
    if file.readinto(found.numpy().data) != num_bytes:
        raise WeightsError(f"{file.name} is cut off")
    return found


def row_blocks(
    shape: tuple[int, ...], multiple: int = 1, block_values: int = BLOCK_VALUES
) -> Iterator[tuple[int, int]]:
    """Yield (first row, number of rows) of blocks of about `block_values` values.

    Each begins at a multiple of `multiple` rows. A scalar counts as one row.
    """
    num_rows = shape[0] if shape else 1
    values_per_row = max(math.prod(shape[1:]), 1)
    step = max(block_values // values_per_row // multiple, 1) * multiple
    for start in range(0, num_rows, step):
        yield start, min(step, num_rows - start)


def read_into(source: WeightSource, name: str, target: Tensor) -> bool:
    """Fill `target`, of any dtype and device, with a tensor of its shape.

    Returns whether all values are finite.
    """
    start, is_finite = 0, True
    for block in source.blocks(name):
        target[start : start + len(block)].copy_(block)
        start += len(block)
        # A sum is cheap, and any value that is not finite makes it so; large values may, too.
        is_finite &= bool(block.sum(dtype=torch.float32).isfinite()) or bool(block.isfinite().all())
    assert start == len(target), f"{name}: {start} of {len(target)} rows"
    return is_finite
