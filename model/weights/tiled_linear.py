"""Matrix products of our own on a CPU: packed weights, one arithmetic for any number of rows.

The kernels are in csrc/products.h. Activations meet bfloat16 weights as bfloat16 or float32, and
integer weights as integers of 15 or 16 bits, relative to the largest of their row. Sums are
float32. A row's result does not depend on the rows beside it.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from model.cpu.library import CpuLibrary
from model.weights.tiles import Tiles

#: Those of `model/weights/linear.py` that can be packed in tiles.
TILED_FORMATS = frozenset({"bf16", "int8", "int4", "own"})


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
