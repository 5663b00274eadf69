"""Random weights for an architecture, generated when read: for benchmarks and capacity tests.

The same config always gives the same weights, in any order of reads.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from model.architectures.arch import ArchSpec
from model.architectures.registry import declare_tensors
from model.weights.interface import QuantizedRows, row_blocks


class DummyWeights:
    """See `WeightSource`: norms are ones, the rest is uniform with a standard deviation of 0.02."""

    own_bits = ""

    def __init__(self, arch: ArchSpec) -> None:
        self.shapes = {name: one.shape for name, one in declare_tensors(arch).items()}
        self.paths: tuple[Path, ...] = ()

    def describe(self, name: str) -> str:
        """See `WeightSource`."""
        return f"tensor {name} of the dummy"

    def blocks(self, name: str) -> Iterator[Tensor]:
        """See `WeightSource`."""
        shape = self.shapes[name]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        for _start, count in row_blocks(shape):
            block = torch.ones(count, *shape[1:])
            if not name.endswith("norm.weight"):
                reach = 0.02 * 3**0.5
                block.uniform_(-reach, reach, generator=generator)
            yield block

    def integers(self, name: str) -> Iterator[QuantizedRows] | None:  # noqa: ARG002 - the interface's
        """See `WeightSource`."""
        return None
