"""Random packed weights, and the operations of a layer in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.kv.arena import Arena
from model.weights.interface import QuantizedRows
from model.weights.tiles import Tiles, pack_floats, pack_integers

F16, F32 = torch.float16, torch.float32
EPS = 1e-5


def random(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(found: Tensor, exact: Tensor) -> float:
    """Return the largest error, relative to the largest value."""
    return float((found - exact).abs().max() / exact.abs().max())


class Coding(NamedTuple):
    """A format of weights; its name in the names of tests."""

    bits: int
    group_inputs: int = 0
    has_minimums: bool = False
    scale_dtype: torch.dtype = F32


CODINGS = [
    Coding(16),
    Coding(4, 32, has_minimums=True, scale_dtype=F16),
    Coding(4, 16),
    Coding(5, 32),
    Coding(6, 16, has_minimums=True),
    Coding(6, 64, scale_dtype=F16),
    Coding(8, 128),
    Coding(8, 32, has_minimums=True, scale_dtype=F16),
]


def tiles_of(coding: Coding, outputs: int, inputs: int, seed: int = 0, size: float = 1.0) -> Tiles:
    """Return random weights with a bias, packed."""
    bias = size * random(outputs, seed=seed + 1)
    if coding.bits == 16:
        return pack_floats(size * random(outputs, inputs, seed=seed), bias, Arena())
    generator = torch.Generator().manual_seed(seed)
    least = 0 if coding.has_minimums else -(2 ** (coding.bits - 1))
    groups = -(-inputs // coding.group_inputs)
    shape = (outputs, groups * coding.group_inputs)
    codes = torch.randint(least, least + 2**coding.bits, shape, generator=generator)
    codes = codes.to(torch.uint8 if coding.has_minimums else torch.int8)
    step = size * 2.0 ** (2 - coding.bits)
    scales = (step * (1 + torch.rand(outputs, groups, generator=generator))).to(coding.scale_dtype)
    minimums = -2 * size + size * random(outputs, groups, seed=seed + 2).to(coding.scale_dtype)
    rows = QuantizedRows(
        codes, scales.float(), minimums.float() if coding.has_minimums else None, coding.bits
    )
    return pack_integers(rows, bias, Arena(), num_inputs=inputs)


def exact_product(tiles: Tiles, x: Tensor) -> Tensor:
    assert tiles.bias is not None
    kept = tiles.rows(torch.arange(tiles.num_outputs)).double()
    return x.double() @ kept.T + tiles.bias[: tiles.num_outputs].double()


def rounded_to_bytes(x: Tensor) -> Tensor:
    """Round to integers of at most 127 times a scale of each 32 inputs, as rows of 8 bits are."""
    blocks = x.view(len(x), -1, 32)
    largest = blocks.abs().amax(2, keepdim=True)
    # The factor is rounded to float32, its product is not.
    factors = torch.full_like(largest, 127) / largest
    wholes = (blocks.double() * factors.double()).round().nan_to_num()
    return wholes.mul((largest / 127).double()).view(x.shape)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate `[tokens, heads, head_dim]` by `[tokens, rotary_dim / 2]`, halves layout."""
    half = angles.shape[1]
    first, second = x[..., :half], x[..., half : 2 * half]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    turned = (first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :])
    return torch.cat(turned, dim=-1)
