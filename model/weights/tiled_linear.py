"""Matrix products of our own on a CPU: weights in tiles, one arithmetic for any number of rows.

The kernels are in csrc/products.h: AMX where the CPU has it, else vectors. Activations enter as
bfloat16 (AMX) or float32, sums are float32. Eight-bit weights meet activations of 15 bits, relative
to the largest of their row (AMX). A row's result does not depend on the rows beside it.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from model.cpu.library import CpuLibrary
from model.kv.arena import Arena

#: Those of `model/weights/linear.py` that can be packed in tiles.
TILED_FORMATS = frozenset({"bf16", "int8"})
#: Of csrc/kernels.h.
_TILE_OUTPUTS, _TILE_INPUTS, _BYTE_TILE_INPUTS = 16, 32, 64
#: Packed at a time, so that packing needs little room beside its result.
_SLAB_OUTPUTS = 64 * _TILE_OUTPUTS


class Tiles:
    """Packed `[outputs, inputs]` weights: bfloat16, or eight bits with a scale to some inputs."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, scale_tiles: int, arena: Arena
    ) -> None:
        """Pack a floating weight and bias: in eight bits with a scale for so many tiles, if any."""
        self.num_outputs, self.num_inputs = weight.shape
        #: Tiles of 64 inputs that share a scale; 0 for bfloat16.
        self.scale_tiles = scale_tiles
        num_groups = -(-self.num_outputs // _TILE_OUTPUTS)
        self._num_byte_tiles = -(-self.num_inputs // _BYTE_TILE_INPUTS)
        dtype = torch.int8 if scale_tiles else torch.bfloat16
        #: Inputs of an output that stand side by side, as four bytes.
        together = 4 // dtype.itemsize
        tile_inputs = _BYTE_TILE_INPUTS if scale_tiles else _TILE_INPUTS
        num_tiles = self._num_byte_tiles * (_BYTE_TILE_INPUTS // tile_inputs)
        shape = (num_groups, num_tiles, tile_inputs // together, _TILE_OUTPUTS, together)
        #: `[output groups, tiles, pairs or fours of inputs, 16 outputs, 2 or 4]`.
        self.weight = arena.take(shape, dtype)
        #: `[output groups, scales, 16 outputs]`.
        self.scales: Tensor | None = None
        if scale_tiles:
            num_scales = -(-self._num_byte_tiles // scale_tiles)
            self.scales = arena.take((num_groups, num_scales, _TILE_OUTPUTS), torch.float32)
        self.bias: Tensor | None = None
        if bias is not None:
            self.bias = torch.zeros(num_groups * _TILE_OUTPUTS)
            self.bias[: self.num_outputs] = bias
        for start in range(0, self.num_outputs, _SLAB_OUTPUTS):
            self._pack(weight[start : start + _SLAB_OUTPUTS], start // _TILE_OUTPUTS)

    def _pack(self, slab: Tensor, first_group: int) -> None:
        num_groups = -(-slab.shape[0] // _TILE_OUTPUTS)
        groups = slice(first_group, first_group + num_groups)
        _, num_tiles, parts, _, together = self.weight.shape
        padded = slab.new_zeros(num_groups * _TILE_OUTPUTS, num_tiles * parts * together)
        padded[: slab.shape[0], : slab.shape[1]] = slab
        if self.scales is not None:
            tiles = padded.float().view(len(padded), num_tiles, _BYTE_TILE_INPUTS)
            largest = tiles.abs().amax(-1)
            for scale, first in enumerate(range(0, num_tiles, self.scale_tiles)):
                share = slice(first, first + self.scale_tiles)
                scales = largest[:, share].amax(-1).div_(127).clamp_min_(1e-30)
                tiles[:, share] /= scales[:, None, None]
                self.scales[groups, scale] = scales.view(num_groups, _TILE_OUTPUTS)
            padded = tiles.round_()
        tiled = padded.view(num_groups, _TILE_OUTPUTS, num_tiles, parts, together)
        self.weight[groups] = tiled.permute(0, 2, 3, 1, 4)

    @property
    def num_bytes(self) -> int:
        """All of it."""
        parts = (self.weight, self.scales, self.bias)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def description(self) -> tuple[int, ...]:
        """Return the `Weights` of csrc/kernels.h: addresses (0: none), bits, groups of inputs."""
        parts = (self.weight, self.scales, None, self.bias)
        addresses = (0 if part is None else part.data_ptr() for part in parts)
        bits = 8 * self.weight.dtype.itemsize
        return (*addresses, bits, self.scale_tiles * _BYTE_TILE_INPUTS, 0, 0)

    def rows(self, indices: Tensor) -> Tensor:
        """Return rows of the weight as float32 `[indices, inputs]`: an embedding's look-up."""
        groups, lanes = indices // _TILE_OUTPUTS, indices % _TILE_OUTPUTS
        # Indexed dimensions come first, whichever they are: tiles, their parts and 2 or 4 follow.
        rows = self.weight[groups, :, :, lanes].float()
        if self.scales is not None:
            per_tile = self.scales[groups, :, lanes].repeat_interleave(self.scale_tiles, dim=1)
            rows *= per_tile[:, : self._num_byte_tiles, None, None]
        return rows.flatten(1)[:, : self.num_inputs].contiguous()


class TiledLinear:
    """See `Linear`."""

    in_dtype = out_dtype = torch.float32

    def __init__(self, tiles: Tiles, library: CpuLibrary) -> None:
        self.tiles = tiles
        self.weight_bytes = tiles.num_bytes
        self._weights = (ctypes.c_int64 * len(tiles.description))(*tiles.description)
        self._kernels = library.kernels
        self._product = library.functions.octavo_product

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        tiles = self.tiles
        out = torch.empty(x.shape[0], tiles.num_outputs)
        self._product(
            self._kernels,
            x.data_ptr(),
            x.shape[0],
            tiles.num_inputs,
            self._weights,
            tiles.num_outputs,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out
