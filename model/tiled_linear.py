"""Matrix products of our own on a CPU: weights in tiles, one arithmetic for any number of rows.

The kernels are in csrc/products.h: AMX where the CPU has it, else vectors. Activations enter as
bfloat16 (AMX) or float32, sums are float32. A row's result does not depend on the rows beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.arena import Arena
from model.cpu_library import CpuLibrary

#: Those of `model/linear.py` that can be packed in tiles.
TILED_FORMATS = frozenset({"bf16", "int8"})
#: Of csrc/kernels.h.
_TILE_OUTPUTS, _TILE_INPUTS, _GROUP_INPUTS = 16, 32, 64
#: Packed at a time, so that packing needs little room beside its result.
_SLAB_OUTPUTS = 64 * _TILE_OUTPUTS


class Tiles:
    """Packed `[outputs, inputs]` weights: bfloat16, or eight bits with a scale to 64 inputs."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, is_int8: bool, arena: Arena) -> None:
        """Pack a floating weight and bias."""
        self.num_outputs, self.num_inputs = weight.shape
        num_groups = -(-self.num_outputs // _TILE_OUTPUTS)
        num_scales = -(-self.num_inputs // _GROUP_INPUTS)
        num_tiles = num_scales * (_GROUP_INPUTS // _TILE_INPUTS)
        dtype = torch.int8 if is_int8 else torch.bfloat16
        shape = (num_groups, num_tiles, _TILE_INPUTS // 2, _TILE_OUTPUTS, 2)
        #: `[output groups, tiles, 16 pairs of inputs, 16 outputs, 2]`.
        self.weight = arena.take(shape, dtype)
        #: `[output groups, groups of inputs, 16 outputs]`.
        self.scales: Tensor | None = None
        if is_int8:
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
        num_tiles = self.weight.shape[1]
        padded = slab.new_zeros(num_groups * _TILE_OUTPUTS, num_tiles * _TILE_INPUTS)
        padded[: slab.shape[0], : slab.shape[1]] = slab
        if self.scales is not None:
            grouped = padded.float().view(len(padded), -1, _GROUP_INPUTS)
            scales = grouped.abs().amax(-1).div_(127).clamp_min_(1e-30)
            padded = grouped.div_(scales.unsqueeze(-1)).round_()
            self.scales[groups] = scales.view(num_groups, _TILE_OUTPUTS, -1).transpose(1, 2)
        tiled = padded.view(num_groups, _TILE_OUTPUTS, num_tiles, _TILE_INPUTS // 2, 2)
        self.weight[groups] = tiled.permute(0, 2, 3, 1, 4)

    @property
    def num_bytes(self) -> int:
        """All of it."""
        parts = (self.weight, self.scales, self.bias)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Of weights, scales and bias; 0 where there is none."""
        parts = (self.weight, self.scales, self.bias)
        weight, scales, bias = (0 if part is None else part.data_ptr() for part in parts)
        return weight, scales, bias

    def rows(self, indices: Tensor) -> Tensor:
        """Return rows of the weight as float32 `[indices, inputs]`: an embedding's look-up."""
        groups, lanes = indices // _TILE_OUTPUTS, indices % _TILE_OUTPUTS
        # Indexed dimensions come first, whichever they are: tiles, pairs and 2 follow.
        rows = self.weight[groups, :, :, lanes].float()
        if self.scales is not None:
            scales = self.scales[groups, :, lanes]
            per_tile = scales.repeat_interleave(_GROUP_INPUTS // _TILE_INPUTS, dim=1)
            rows *= per_tile[:, :, None, None]
        return rows.flatten(1)[:, : self.num_inputs].contiguous()


class TiledLinear:
    """See `Linear`."""

    in_dtype = out_dtype = torch.float32

    def __init__(self, tiles: Tiles, library: CpuLibrary) -> None:
        self.tiles = tiles
        self.weight_bytes = tiles.num_bytes
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
            *tiles.addresses,
            tiles.num_outputs,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


class TiledEmbedding:
    """See `Embedding`: the rows of the product that gives the logits."""

    def __init__(self, tiles: Tiles) -> None:
        self.num_bytes = tiles.num_bytes
        self._tiles = tiles

    def __call__(self, token_ids: Tensor) -> Tensor:
        """See `Embedding`."""
        return self._tiles.rows(token_ids)
