"""A quantized matrix in memory, whatever its layout in the file: codes, scales, zero points.

The values are exact: float32 holds each code, and one product rounds once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.weights.interface import QuantizedRows, row_blocks


@dataclass(frozen=True, slots=True)
class CodedMatrix:
    """`[outputs, inputs]` values: scale * (code - zero point)."""

    #: uint8, int8 or 8-bit floats, `[outputs, inputs]`.
    codes: Tensor
    #: float32 `[blocks of outputs, groups of inputs]`.
    scales: Tensor
    #: As `scales`; None: all are 0.
    zeros: Tensor | None
    #: Outputs and inputs that share a scale.
    block: tuple[int, int]
    #: Of a code.
    bits: int
    #: int64 `[inputs]`, the group of each input; None: groups are in order.
    group_of_input: Tensor | None = None

    def rows(self) -> Iterator[Tensor]:
        """Yield consecutive rows in float32."""
        for start, count in row_blocks(tuple(self.codes.shape)):
            blocks = torch.arange(start, start + count) // self.block[0]
            values = _widened(self.codes[start : start + count])
            if self.zeros is not None:
                values -= self._to_inputs(self.zeros[blocks])
            yield values.mul_(self._to_inputs(self.scales[blocks]))

    def is_finite(self) -> bool:
        """Return whether all values are finite."""
        is_nan = torch.zeros(())
        if self.codes.is_floating_point():
            is_nan = (self.codes.view(torch.uint8) & 0x7F) == 0x7F
        return bool(self.scales.isfinite().all()) and not bool(is_nan.any())

    def _to_inputs(self, groups: Tensor) -> Tensor:
        """Return the values `[rows, groups]` for each input, `[rows, inputs]`."""
        if groups.shape[1] == 1:
            return groups
        if self.group_of_input is not None:
            return groups[:, self.group_of_input]
        return groups.repeat_interleave(self.block[1], dim=1)[:, : self.codes.shape[1]]

    def quantized(self) -> QuantizedRows | None:
        """See `WeightSource`; None for floats, mixed groups and a last group that is cut short."""
        num_outputs, num_inputs = self.codes.shape
        is_cut = num_inputs % self.block[1] != 0
        if self.codes.is_floating_point() or self.group_of_input is not None or is_cut:
            return None
        middle = 1 << (self.bits - 1)
        is_unsigned = self.codes.dtype == torch.uint8
        blocks = torch.arange(num_outputs) // self.block[0]
        scales = self.scales[blocks]
        zeros = torch.zeros(()) if self.zeros is None else self.zeros
        if bool((zeros == (middle if is_unsigned else 0)).all()):
            signed = (self.codes - middle).view(torch.int8) if is_unsigned else self.codes
            return QuantizedRows(signed, scales, None, self.bits)
        minimums = -scales * (zeros if is_unsigned else zeros + middle)[blocks]
        # Bytes wrap: -8 is 248, and 8 more is 0.
        unsigned = self.codes if is_unsigned else self.codes.view(torch.uint8) + middle
        return QuantizedRows(unsigned, scales, minimums, self.bits)


def _widened(codes: Tensor) -> Tensor:
    """Return codes in float32. Floats are looked up, thrice as fast as torch converts them."""
    if not codes.is_floating_point():
        return codes.float()
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    return table.index_select(0, codes.view(torch.uint8).int().flatten()).view(codes.shape)
