"""Converts matrices of integers between their forms, without rounding.

Knows nothing of files or of tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True, slots=True)
class Form:
    """The form of the parts of one matrix."""

    bits: int
    group_inputs: int
    #: Codes are int8 where they have eight bits or there are no minimums, otherwise uint8.
    is_signed: bool
    has_minimums: bool


def form_of(parts: Sequence[QuantizedRows]) -> Form | None:
    """Return the form in which some parts fit together, or None where their groups do not.

    Lower bits widen to the highest ones. Of a part a few rows are enough, unless its codes are
    unsigned and have eight bits.
    """
    bits = max(part.bits for part in parts)
    inputs = math.gcd(_MOST_GROUP_INPUTS, *map(group_inputs, parts))
    if inputs < _LEAST_GROUP_INPUTS:
        return None
    has_minimums = any(part.minimums is not None for part in parts)
    are_signed = [part.codes.dtype == torch.int8 for part in parts]
    if bits == _BYTE_BITS:
        move = any(map(_has_large_codes, parts))
        return Form(bits, inputs, is_signed=True, has_minimums=has_minimums or move)
    is_signed = all(are_signed) and not has_minimums
    # Signed codes that become unsigned move, and their minimums with them.
    move = any(are_signed) and not is_signed
    return Form(bits, inputs, is_signed, has_minimums or move)


def conform(rows: QuantizedRows, form: Form) -> QuantizedRows:
    """Return rows in a form that `form_of` found for them and others."""
    rows = _regroup(rows, form.group_inputs)
    rows = _signed(rows) if form.is_signed else _unsigned(rows)
    minimums = _minimums(rows) if form.has_minimums else rows.minimums
    assert form.has_minimums == (minimums is not None), "rows have another form than the first"
    return replace(rows, minimums=minimums, bits=form.bits)


def join(parts: Sequence[QuantizedRows]) -> QuantizedRows | None:
    """Return the rows of all parts as one matrix, or None where their groups do not fit together.

    See `form_of`.
    """
    form = form_of(parts)
    return None if form is None else stack([conform(part, form) for part in parts])


def stack(parts: Sequence[QuantizedRows]) -> QuantizedRows:
    """Return the rows of parts of the same form as one matrix."""
    if len(parts) == 1:
        return parts[0]
    minimums = [part.minimums for part in parts if part.minimums is not None]
    return QuantizedRows(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(minimums) if minimums else None,
        parts[0].bits,
    )


def rows_of(rows: QuantizedRows, which: slice) -> QuantizedRows:
    """Return some of the rows."""
    minimums = None if rows.minimums is None else rows.minimums[which]
    return QuantizedRows(rows.codes[which], rows.scales[which], minimums, rows.bits)


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


def _has_large_codes(rows: QuantizedRows) -> bool:
    """Return whether codes are too large for int8."""
    is_wide = rows.codes.dtype == torch.uint8 and rows.bits == _BYTE_BITS
    return is_wide and int(rows.codes.max()) > _MOST_SIGNED


def _signed(rows: QuantizedRows) -> QuantizedRows:
    """Return int8 codes. Larger codes move by 128, and the minimums by the same."""
    if rows.codes.dtype == torch.int8:
        return rows
    if not _has_large_codes(rows):
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
