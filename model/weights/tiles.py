"""Weights in the tiles of our own products on a CPU: bfloat16, or integer codes with scales.

The layout is that of csrc/products.h. Knows nothing of the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from model.cpu.library import DTYPE_CODES
from model.kv.arena import Arena
from model.weights.interface import QuantizedRows
from model.weights.quantized_rows import group_inputs, join
from model.weights.tile_layout import TILE_INPUTS, TILE_OUTPUTS, arrange, num_lines, restore

#: Bits of a bfloat16 weight, and its tile: pairs of inputs for the 16 outputs.
_WIDE_BITS, _PAIR = 16, 2
_WIDE_TILE_PAIRS = 16
_BYTE_BITS = 8
#: Packed at a time, so that packing needs little room beside its result.
_SLAB_VALUES = 2**20
#: Relative error of a number that is rounded to float16.
_HALF_ERROR = 2.0**-11


@dataclass(frozen=True, slots=True)
class Tiles:
    """Packed `[outputs, inputs]` weights and a bias."""

    num_outputs: int
    num_inputs: int
    #: 16 of bfloat16 weights, otherwise those of a code: 4, 5, 6 or 8.
    bits: int
    #: `[output groups, tiles, 16 pairs of inputs, 16 outputs, 2]` of bfloat16, or uint8
    #: `[output groups, tiles, lines, 16 outputs, 4]`; see `model/weights/tile_layout.py`.
    weight: Tensor
    #: `[output groups, scales, 16 outputs]`, float16 or float32; None of bfloat16 weights.
    scales: Tensor | None = None
    #: As `scales`: added to the scaled codes.
    minimums: Tensor | None = None
    #: Padded to whole output groups.
    bias: Tensor | None = None
    #: Inputs that share a scale.
    group_inputs: int = 0
    #: Subtracted from each code of fewer than eight bits.
    code_offset: int = 0

    @property
    def part(self) -> dict[str, Tensor | int | None]:
        """Return all attributes, for a file of packed weights."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def from_part(cls, part: Mapping[str, Any]) -> Self:
        """Make the tiles of a `part` again."""
        return cls(**part)

    @property
    def num_bytes(self) -> int:
        """Return the memory of all parts."""
        return sum(part.nbytes for part in self._parts if part is not None)

    @property
    def description(self) -> tuple[int, ...]:
        """Return the numbers of csrc/kernels.h's `Weights` but for the bits of activations.

        The address of a missing part is 0.
        """
        addresses = (0 if part is None else part.data_ptr() for part in self._parts)
        dtype = 0 if self.scales is None else DTYPE_CODES[self.scales.dtype]
        return (*addresses, self.bits, self.group_inputs, self.code_offset, dtype)

    @property
    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.scales, self.minimums, self.bias

    def rows(self, indices: Tensor) -> Tensor:
        """Return rows of the weight as float32 `[indices, inputs]`: an embedding's look-up."""
        groups, lanes = indices // TILE_OUTPUTS, indices % TILE_OUTPUTS
        # Indexed dimensions come first, whichever they are: tiles, their lines and 2 or 4 follow.
        lines = self.weight[groups, :, :, lanes]
        if self.scales is None:
            return lines.flatten(1)[:, : self.num_inputs].float()
        codes = restore(lines, self.bits)
        values = (codes.view(torch.int8) if self.bits == _BYTE_BITS else codes).float()
        values -= self.code_offset
        values *= self._per_input(self.scales[groups, :, lanes])
        if self.minimums is not None:
            values += self._per_input(self.minimums[groups, :, lanes])
        return values[:, : self.num_inputs].contiguous()

    def _per_input(self, factors: Tensor) -> Tensor:
        """Repeat `[indices, scales]` for each input of the padded rows."""
        num_padded = self.weight.shape[1] * TILE_INPUTS
        return factors.float().repeat_interleave(self.group_inputs, dim=1)[:, :num_padded]


@dataclass(frozen=True, slots=True)
class Factors:
    """Everything of integer weights but the codes: see `QuantizedRows` and `Tiles`."""

    bits: int
    group_inputs: int
    code_offset: int
    #: float32 `[outputs, groups]`.
    scales: Tensor
    minimums: Tensor | None

    @classmethod
    def of(cls, rows: QuantizedRows) -> Self:
        """Return those of some rows; signed codes of fewer than eight bits become unsigned."""
        is_signed = rows.codes.dtype == torch.int8
        offset = 2 ** (rows.bits - 1) if is_signed and rows.bits < _BYTE_BITS else 0
        return cls(rows.bits, group_inputs(rows), offset, rows.scales, rows.minimums)


def pack_floats(weight: Tensor, bias: Tensor | None, arena: Arena) -> Tiles:
    """Pack a floating weight as bfloat16."""
    num_outputs, num_inputs = weight.shape
    packed = empty_floats((num_outputs, num_inputs), arena)
    num_tiles = packed.shape[1]
    padded_inputs = num_tiles * _WIDE_TILE_PAIRS * _PAIR
    for groups, rows in _slabs(num_outputs, padded_inputs):
        slab = _padded(weight[rows], padded_inputs).bfloat16()
        # A pair is a word of four bytes: moving words takes a third of the time.
        words = slab.view(torch.int32).view(-1, TILE_OUTPUTS, num_tiles, _WIDE_TILE_PAIRS)
        packed[groups].view(torch.int32).squeeze(-1).copy_(words.permute(0, 2, 3, 1))
    return tiles_of_floats(packed, (num_outputs, num_inputs), bias)


def pack_integers(
    rows: QuantizedRows, bias: Tensor | None, arena: Arena, *, num_inputs: int | None = None
) -> Tiles:
    """Pack integers as they are; scales and minimums are float16 where that rounds by 2**-11.

    `num_inputs`: those of the product, where the rows are padded to whole groups.
    """
    found = join((rows,))
    assert found is not None, "groups of fewer than 16 inputs"
    num_outputs = len(found.codes)
    shape = num_outputs, num_inputs or found.codes.shape[1]
    packed = empty_codes(shape, found.bits, arena)
    padded_inputs = packed.shape[1] * TILE_INPUTS
    codes, factors = found.codes.view(torch.uint8), Factors.of(found)
    offset = factors.code_offset
    for groups, slab_rows in _slabs(num_outputs, padded_inputs):
        # Addition in eight bits wraps, so that -8 + 8 is 0.
        slab = _padded(codes[slab_rows] + offset, padded_inputs, offset)
        packed[groups] = arrange(slab, found.bits)
    return tiles_of_codes(packed, factors, shape, bias, arena)


def empty_floats(shape: tuple[int, int], arena: Arena) -> Tensor:
    """Return room for the tiles of a weight `[outputs, inputs]` in bfloat16."""
    # Tiles of integers have twice as many inputs, and a panel of activations serves both.
    num_tiles = 2 * _whole(shape[1], TILE_INPUTS)
    groups = _whole(shape[0], TILE_OUTPUTS)
    return arena.take((groups, num_tiles, _WIDE_TILE_PAIRS, TILE_OUTPUTS, _PAIR), torch.bfloat16)


def empty_codes(shape: tuple[int, int], bits: int, arena: Arena) -> Tensor:
    """Return room for the tiles of codes `[outputs, inputs]`."""
    groups, num_tiles = _whole(shape[0], TILE_OUTPUTS), _whole(shape[1], TILE_INPUTS)
    return arena.take((groups, num_tiles, num_lines(bits), TILE_OUTPUTS, 4), torch.uint8)


def tiles_of_floats(packed: Tensor, shape: tuple[int, int], bias: Tensor | None) -> Tiles:
    """Return tiles whose weights are packed."""
    return Tiles(*shape, _WIDE_BITS, packed, bias=_padded_bias(bias))


def tiles_of_codes(
    packed: Tensor, factors: Factors, shape: tuple[int, int], bias: Tensor | None, arena: Arena
) -> Tiles:
    """Return tiles whose codes are packed."""
    dtype = _factor_dtype(factors)
    num_scales = _whole(packed.shape[1] * TILE_INPUTS, factors.group_inputs)
    scales, minimums = (
        None if part is None else _pack_factors(part, num_scales, dtype, arena)
        for part in (factors.scales, factors.minimums)
    )
    return Tiles(
        *shape,
        factors.bits,
        packed,
        scales,
        minimums,
        _padded_bias(bias),
        group_inputs=factors.group_inputs,
        code_offset=factors.code_offset,
    )


def _whole(count: int, size: int) -> int:
    return -(-count // size)


def _slabs(num_outputs: int, padded_inputs: int) -> Iterator[tuple[slice, slice]]:
    """Yield the output groups of each slab, and its rows."""
    step = max(_SLAB_VALUES // padded_inputs // TILE_OUTPUTS, 1)
    for first in range(0, _whole(num_outputs, TILE_OUTPUTS), step):
        end = first + step
        yield slice(first, end), slice(first * TILE_OUTPUTS, end * TILE_OUTPUTS)


def _padded(slab: Tensor, num_inputs: int, value: int = 0) -> Tensor:
    """Return rows with so many inputs, and with whole output groups."""
    more_rows = -len(slab) % TILE_OUTPUTS
    # A negative number cuts: rows may be padded to whole groups of inputs.
    return functional.pad(slab, (0, num_inputs - slab.shape[1], 0, more_rows), value=value)


def _padded_bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else functional.pad(bias.float(), (0, -len(bias) % TILE_OUTPUTS))


def _factor_dtype(factors: Factors) -> torch.dtype:
    """Return float16 if no factor changes by more than 2**-11 of the largest one of its output."""
    for part in (factors.scales, factors.minimums):
        if part is None:
            continue
        error = (part.half().float() - part).abs_()
        if not bool((error <= _HALF_ERROR * part.abs().amax(1, keepdim=True)).all()):
            return torch.float32
    return torch.float16


def _pack_factors(factors: Tensor, num_scales: int, dtype: torch.dtype, arena: Arena) -> Tensor:
    """Arrange `[outputs, groups]` as `[output groups, scales, 16 outputs]`."""
    padded = _padded(factors, num_scales)
    tiled = padded.view(-1, TILE_OUTPUTS, num_scales).transpose(1, 2)
    return arena.take(tuple(tiled.shape), dtype).copy_(tiled)
