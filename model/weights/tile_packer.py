"""Packs the rows of a product in tiles as they are read, by the compiled operations.

A value is read once, in a block of the file that lies in the cache, and written once, to its tile.
No whole matrix is in memory. The results are those of `pack_floats` and `pack_integers`
(`model/weights/tiles.py`) to the bit. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model.cpu.library import DTYPE_CODES, CpuLibrary
from model.kv.arena import Arena
from model.weights.interface import QuantizedRows
from model.weights.quantized_rows import Form, conform, is_finite, rows_of, stack
from model.weights.round_integers import Rounding
from model.weights.tile_layout import TILE_OUTPUTS
from model.weights.tiles import (
    Factors,
    Tiles,
    empty_codes,
    empty_floats,
    tiles_of_codes,
    tiles_of_floats,
)

_WIDE_BITS, _BYTE_BITS = 16, 8


class TilePacker:
    """Takes a product's floating weights row after row, and makes `Tiles` of them."""

    def __init__(
        self,
        shape: tuple[int, int],
        rounding: Rounding | None,
        arena: Arena,
        library: CpuLibrary,
    ) -> None:
        """`shape`: outputs and inputs. `rounding`: to integers; None: to bfloat16."""
        self._shape = shape
        self._rounding = rounding
        self._arena = arena
        self._library = library
        if rounding is None:
            self._packed = empty_floats(shape, arena)
        else:
            self._packed = empty_codes(shape, rounding.bits, arena)
        #: Of each run of rows.
        self._factors: list[Factors] = []
        #: Rows that wait for the others of their output group.
        self._waiting = torch.empty(TILE_OUTPUTS, shape[1])
        self._num_waiting = self._num_packed = 0

    def add(self, blocks: Iterable[Tensor]) -> bool:
        """Pack consecutive rows, of any floating dtype; return whether all are finite."""
        are_finite = True
        for block in blocks:
            # Rows of two blocks, or of two matrices, may share an output group.
            num_first = min(-self._num_waiting % TILE_OUTPUTS, len(block))
            num_whole = (len(block) - num_first) // TILE_OUTPUTS * TILE_OUTPUTS
            are_finite &= self._wait(block[:num_first])
            are_finite &= self._pack(block[num_first : num_first + num_whole])
            are_finite &= self._wait(block[num_first + num_whole :])
        return are_finite

    def tiles(self, bias: Tensor | None) -> Tiles:
        """Return the tiles, when all rows were added."""
        self._pack_waiting()
        assert self._num_packed == self._shape[0], f"{self._num_packed} of {self._shape[0]} rows"
        if self._rounding is None:
            return tiles_of_floats(self._packed, self._shape, bias)
        return tiles_of_codes(self._packed, _stacked(self._factors), self._shape, bias, self._arena)

    def _wait(self, rows: Tensor) -> bool:
        """Keep rows until their output group is whole; return whether all are finite."""
        if not len(rows):
            return True
        self._waiting[self._num_waiting : self._num_waiting + len(rows)] = rows
        self._num_waiting += len(rows)
        if self._num_waiting == TILE_OUTPUTS:
            self._pack_waiting()
        # A sum is cheap, and any value that is not finite makes it so; large values may, too.
        return bool(rows.sum(dtype=torch.float32).isfinite()) or bool(rows.isfinite().all())

    def _pack_waiting(self) -> None:
        rows, self._num_waiting = self._waiting[: self._num_waiting], 0
        self._pack(rows)

    def _pack(self, rows: Tensor) -> bool:
        """Pack rows that begin an output group; return whether all are finite."""
        if not len(rows):
            return True
        target = self._packed[self._num_packed // TILE_OUTPUTS :]
        self._num_packed += len(rows)
        rounding = self._rounding
        if rounding is None:
            return _call(self._library, _floats(rows), target, _WIDE_BITS)
        factors = _room_for_factors(rounding, rows)
        self._factors.append(factors)
        return _call(self._library, _floats(rows), target, rounding.bits, factors)


class CodePacker:
    """Takes a product's integers row after row, and makes `Tiles` of them."""

    def __init__(
        self, shape: tuple[int, int], form: Form, arena: Arena, library: CpuLibrary
    ) -> None:
        """`shape`: outputs and inputs; `form`: that of all rows."""
        self._shape = shape
        self._form = form
        self._arena = arena
        self._library = library
        self._packed = empty_codes(shape, form.bits, arena)
        self._factors: list[Factors] = []
        #: Rows that wait for the others of their output group.
        self._waiting: QuantizedRows | None = None
        self._num_packed = 0

    def add(self, blocks: Iterable[QuantizedRows]) -> bool:
        """Pack consecutive rows, which have the form of all; return whether all are finite."""
        are_finite = True
        for block in blocks:
            rows = conform(block, self._form)
            are_finite &= is_finite(rows)
            if self._waiting is not None:
                rows = stack([self._waiting, rows])
            num_whole = len(rows.codes) // TILE_OUTPUTS * TILE_OUTPUTS
            self._pack(rows_of(rows, slice(num_whole)))
            rest = rows_of(rows, slice(num_whole, None))
            self._waiting = rest if len(rest.codes) else None
        return are_finite

    def tiles(self, bias: Tensor | None) -> Tiles:
        """Return the tiles, when all rows were added."""
        if self._waiting is not None:
            self._pack(self._waiting)
        assert self._num_packed == self._shape[0], f"{self._num_packed} of {self._shape[0]} rows"
        return tiles_of_codes(self._packed, _stacked(self._factors), self._shape, bias, self._arena)

    def _pack(self, rows: QuantizedRows) -> None:
        if len(rows.codes):
            target = self._packed[self._num_packed // TILE_OUTPUTS :]
            self._factors.append(_pack_codes(self._library, rows, target))
            self._num_packed += len(rows.codes)


def _pack_codes(library: CpuLibrary, rows: QuantizedRows, target: Tensor) -> Factors:
    factors = Factors.of(rows)
    codes = rows.codes.view(torch.uint8)
    _call(library, codes, target, rows.bits, code_offset=factors.code_offset)
    return factors


def _room_for_factors(rounding: Rounding, rows: Tensor) -> Factors:
    """Return factors whose scales and minimums are to be filled in."""
    bits, inputs = rounding.bits, rounding.group_inputs
    shape = len(rows), -(-rows.shape[1] // inputs)
    if rounding.is_searched:
        return Factors(bits, inputs, 0, torch.empty(shape), torch.empty(shape))
    # Codes around zero.
    offset = 0 if bits == _BYTE_BITS else 2 ** (bits - 1)
    return Factors(bits, inputs, offset, torch.empty(shape), minimums=None)


def _stacked(parts: Sequence[Factors]) -> Factors:
    """Return the factors of all rows."""
    first = parts[0]
    minimums = [part.minimums for part in parts if part.minimums is not None]
    return replace(
        first,
        scales=torch.cat([part.scales for part in parts]),
        minimums=torch.cat(minimums) if minimums else None,
    )


def _floats(rows: Tensor) -> Tensor:
    return rows if rows.dtype in DTYPE_CODES else rows.float()


def _call(
    library: CpuLibrary,
    rows: Tensor,
    target: Tensor,
    bits: int,
    rounded: Factors | None = None,
    code_offset: int = 0,
) -> bool:
    """Write rows to tiles; return whether all are finite.

    `rows`: floats, or codes of a byte each. `rounded`: floats become codes, with scales there.
    """
    is_finite = library.functions.octavo_pack(
        library.kernels,
        rows.data_ptr(),
        DTYPE_CODES.get(rows.dtype, 0),
        rows.stride(0),
        *rows.shape,
        target.shape[1],
        bits,
        rounded.code_offset if rounded else code_offset,
        rounded.group_inputs if rounded else 0,
        target.data_ptr(),
        rounded.scales.data_ptr() if rounded else None,
        None if rounded is None or rounded.minimums is None else rounded.minimums.data_ptr(),
    )
    return bool(is_finite)
