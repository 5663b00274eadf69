"""Matrix products of our own on a CPU: packed weights, one arithmetic for any number of rows.

The kernels are in csrc/products.h. Activations meet bfloat16 weights as bfloat16 or float32. They
meet integer weights as integers: of 16 bits, relative to the largest of their row, or of 8 bits,
relative to the largest of 32 inputs. Sums are float32. A row's result does not depend on the rows
beside it.
"""

from __future__ import annotations

import ctypes
from typing import Literal

import torch
from torch import Tensor

from model.cpu.library import CpuLibrary
from model.weights.tiles import Tiles

#: Of the activations that meet integer weights.
ActivationBits = Literal[8, 16]
#: Those of `model/weights/linear.py` that can be packed in tiles.
TILED_FORMATS = frozenset({"bf16", "int8", "int4", "own"})
INTEGER_FORMATS = TILED_FORMATS - {"bf16"}


class TiledLinear:
    """See `Linear`."""

    in_dtype = out_dtype = torch.float32

    def __init__(
        self, tiles: Tiles, library: CpuLibrary, activation_bits: ActivationBits = 16
    ) -> None:
        self.tiles = tiles
        self.weight_bytes = tiles.num_bytes
        #: The numbers of csrc/kernels.h's `Weights`.
        self.description = (*tiles.description, activation_bits)
        self._weights = (ctypes.c_int64 * len(self.description))(*self.description)
        self._kernels = library.kernels
        self._product = library.functions.octavo_product
        self._look_up = library.functions.octavo_look_up

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

    def rows(self, indices: Tensor) -> Tensor:
        """Return rows of the weight, as `Tiles.rows` does; raises `IndexError`."""
        tiles, indices = self.tiles, indices.contiguous()
        out = torch.empty(len(indices), tiles.num_inputs)
        if not self._look_up(
            self._kernels,
            self._weights,
            tiles.num_outputs,
            tiles.num_inputs,
            indices.data_ptr(),
            len(indices),
            out.data_ptr(),
        ):
            raise IndexError(f"a row is not below {tiles.num_outputs}: {indices.tolist()}")
        return out
