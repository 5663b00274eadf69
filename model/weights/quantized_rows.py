"""Converts matrices of integers between their forms, without rounding.

Knows nothing of files or of tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model.weights.interface import QuantizedRows

#: Sizes of groups that kernels support are 16, 32, 64 and 128.
_LEAST_GROUP_INPUTS, _MOST_GROUP_INPUTS = 16, 128
_BYTE_BITS, _MOST_SIGNED = 8, 127


def group_inputs(rows: QuantizedRows) -> int:
    """Return the number of inputs that share a scale."""
    return rows.codes.shape[1] // rows.scales.shape[1]


def dequantize(rows: QuantizedRows) -> Tensor:
    """Return the values as float32 `[outputs, inputs]`."""
    values = torch.unflatten(rows.codes, 1, (rows.scales.shape[1], -1)) * rows.scales[:, :, None]
    if rows.minimums is not None:
        values += rows.minimums[:, :, None]
    return values.flatten(1)


def is_finite(rows: QuantizedRows) -> bool:
    """Return whether all values are finite."""
    return all(bool(part.isfinite().all()) for part in _factors(rows))


def join(parts: Sequence[QuantizedRows]) -> QuantizedRows | None:
    """Return the rows of all parts as one matrix, or None where their groups do not fit together.

    Lower bits widen to the highest ones. Codes are int8 where they have eight bits or there are no
    minimums, otherwise uint8.
    """
    bits = max(part.bits for part in parts)
    inputs = math.gcd(_MOST_GROUP_INPUTS, *map(group_inputs, parts))
    if inputs < _LEAST_GROUP_INPUTS:
        return None
    parts = [_regroup(part, inputs) for part in parts]
    if bits == _BYTE_BITS:
        parts = [_signed(part) for part in parts]
    elif not all(part.minimums is None and part.codes.dtype == torch.int8 for part in parts):
        parts = [_unsigned(part) for part in parts]
    if len(parts) == 1:
        return parts[0]
    minimums = None
    if any(part.minimums is not None for part in parts):
        minimums = torch.cat([_minimums(part) for part in parts])
    codes = torch.cat([part.codes for part in parts])
    return QuantizedRows(codes, torch.cat([part.scales for part in parts]), minimums, bits)


def _factors(rows: QuantizedRows) -> Iterator[Tensor]:
    yield rows.scales
    if rows.minimums is not None:
        yield rows.minimums


def _minimums(rows: QuantizedRows) -> Tensor:
    return torch.zeros_like(rows.scales) if rows.minimums is None else rows.minimums


def _regroup(rows: QuantizedRows, inputs: int) -> QuantizedRows:
    """Repeat scales, so that a group has so many inputs."""
    times = group_inputs(rows) // inputs
    if times == 1:
        return rows
    scales = rows.scales.repeat_interleave(times, dim=1)
    minimums = None if rows.minimums is None else rows.minimums.repeat_interleave(times, dim=1)
    return replace(rows, scales=scales, minimums=minimums)


def _signed(rows: QuantizedRows) -> QuantizedRows:
    """Return int8 codes. Larger codes move by 128, and the minimums by the same."""
    if rows.codes.dtype == torch.int8:
        return rows
    if int(rows.codes.max()) <= _MOST_SIGNED:
        return replace(rows, codes=rows.codes.view(torch.int8))
    codes = (rows.codes - 2**7).view(torch.int8)
    return replace(rows, codes=codes, minimums=_minimums(rows) + rows.scales * 2**7)


def _unsigned(rows: QuantizedRows) -> QuantizedRows:
    """Return uint8 codes. Signed ones move by half of their range, and the minimums by the same."""
    if rows.codes.dtype == torch.uint8:
        return rows
    offset = 2 ** (rows.bits - 1)
    codes = rows.codes.view(torch.uint8) + offset
    return replace(rows, codes=codes, minimums=_minimums(rows) - rows.scales * offset)
