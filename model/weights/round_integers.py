"""Rounds floating weights to integers of eight, six or four bits, each group of inputs by itself.

Four bits: the scale and the minimum of a group are those of the least squared error that a short
search finds, in the manner of ggml's `make_qkx2_quants` (ggml-quants.c). Codes by a scale and a
minimum, and then the best scale and minimum of these codes (a line through points), take turns
from two beginnings. Knows nothing of files or of tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from model.weights.interface import QuantizedRows

#: Inputs of eight bits that share a scale. A layer multiplies whole prompts, where each scale costs
#: time; the logits, of few rows, lose most by rounding (docs/performance.md).
_LAYER_GROUP_INPUTS, _HEAD_GROUP_INPUTS = 128, 64
#: Of six and of four bits.
_SMALL_GROUP_INPUTS = 32
#: In int4 these keep six bits: values and `down` lose most by rounding (docs/performance.md), as in
#: llama.cpp's Q4_K_M.
_SIX_BIT_PARTS = frozenset({"qkv", "down"})
_MOST_NIBBLE = 15
#: Scales of zeros alone; also keeps reciprocals finite.
_LEAST_SCALE = 1e-30
_LEAST_HALF = torch.finfo(torch.float16).tiny
#: Steps by which the first scale is too fine for the whole range: none, and three for long tails.
_BEGINNINGS, _NUM_TURNS = (0, 3), 3
#: Rounded at a time, so that the search stays in a cache.
_BLOCK_VALUES = 2**16


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a product's floating weights become integers."""

    bits: int
    group_inputs: int
    #: With minimums, by the least squared error; otherwise by the largest magnitude.
    is_searched: bool = False

    def __call__(self, weight: Tensor) -> QuantizedRows:
        """Round a weight `[outputs, inputs]`; the result has zeros up to whole groups of inputs."""
        if self.is_searched:
            return by_search(weight, self.group_inputs)
        return by_magnitude(weight, self.bits, self.group_inputs)


def rounding_of(fmt: Literal["int8", "int4"], part: str) -> Rounding:
    """Return the rounding of a product: to few bits, or more where these lose too much.

    `part`: the product's name in its layer, or that of the product which gives the logits.
    """
    if part in {"embedding", "lm_head"}:
        return Rounding(8, _HEAD_GROUP_INPUTS)
    if fmt == "int8":
        return Rounding(8, _LAYER_GROUP_INPUTS)
    if part in _SIX_BIT_PARTS:
        return Rounding(6, _SMALL_GROUP_INPUTS)
    return Rounding(4, _SMALL_GROUP_INPUTS, is_searched=True)


def by_magnitude(weight: Tensor, bits: int, group_inputs: int) -> QuantizedRows:
    """Round to codes around zero, by the largest magnitude of each group."""
    return _by_blocks(weight, group_inputs, bits, partial(_round_signed, bits=bits))


def by_search(weight: Tensor, group_inputs: int) -> QuantizedRows:
    """Round to four bits with minimums, by the least squared error of each group."""
    return _by_blocks(weight, group_inputs, 4, _round_nibbles)


#: From `[groups, inputs of a group]`: codes, scales and minimums, the latter two `[groups, 1]`.
_Round = Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]


def _by_blocks(weight: Tensor, group_inputs: int, bits: int, rounder: _Round) -> QuantizedRows:
    num_outputs, num_inputs = weight.shape
    num_groups = -(-num_inputs // group_inputs)
    width = num_groups * group_inputs
    found = []
    step = max(_BLOCK_VALUES // width, 1)
    for start in range(0, num_outputs, step):
        rows = weight[start : start + step].float()
        padded = functional.pad(rows, (0, width - num_inputs))
        found.append(rounder(padded.view(-1, group_inputs)))
    codes, scales, minimums = zip(*found, strict=True)
    return QuantizedRows(
        torch.cat(codes).view(num_outputs, width),
        torch.cat(scales).view(num_outputs, num_groups),
        None if minimums[0] is None else torch.cat(minimums).view(num_outputs, num_groups),
        bits,
    )


def _round_signed(groups: Tensor, *, bits: int) -> tuple[Tensor, Tensor, None]:
    most = 2 ** (bits - 1) - 1
    scales = groups.abs().amax(1, keepdim=True).div_(most).clamp_min_(_LEAST_SCALE)
    scales = _half(scales)
    return (groups / scales).round_().clamp_(-most, most).to(torch.int8), scales, None


def _round_nibbles(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = groups.aminmax(dim=1, keepdim=True)
    reach = (high - low).clamp_min_(_LEAST_SCALE)
    scales, minimums, least = reach / _MOST_NIBBLE, low, torch.full_like(low, torch.inf)
    for beginning in _BEGINNINGS:
        scale = reach / (_MOST_NIBBLE + beginning)
        minimum = low + scale * (beginning / 2)
        for _turn in range(_NUM_TURNS):
            scale, minimum = _line(groups, _codes(groups, scale, minimum), scale, minimum)
        # As they will be kept, where halves have room for them.
        scale, minimum = _half(scale), _half(minimum)
        fitted = _codes(groups, scale, minimum).mul_(scale).add_(minimum)
        error = _sum(fitted.sub_(groups).square_())
        is_better = error < least
        least = torch.where(is_better, error, least)
        scales = torch.where(is_better, scale, scales)
        minimums = torch.where(is_better, minimum, minimums)
    return _codes(groups, scales, minimums).to(torch.uint8), scales, minimums


def _codes(groups: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    return ((groups - minimum) / scale).round_().clamp_(0, _MOST_NIBBLE)


def _line(groups: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale and minimum of least squares; the given ones where all codes are equal."""
    count = groups.shape[1]
    sum_codes, sum_values = codes.sum(1, keepdim=True), _sum(groups)
    sum_both = _sum(codes * groups)
    # Whole numbers, exact in float32: a group has few inputs.
    spread = count * codes.square_().sum(1, keepdim=True) - sum_codes.square()
    slope = (count * sum_both - sum_codes * sum_values) / spread
    is_line = spread > 0
    return (
        torch.where(is_line, slope, scale),
        torch.where(is_line, (sum_values - slope * sum_codes) / count, minimum),
    )


def _sum(groups: Tensor) -> Tensor:
    """Add halves until one number is left: an order that vectors of any width have, too."""
    while (count := groups.shape[1]) > 1:
        groups = groups[:, : count // 2] + groups[:, count // 2 :]
    return groups


def _half(factor: Tensor) -> Tensor:
    """Round to float16 where that is a normal number, so that packing rounds nothing more."""
    rounded = factor.half().float()
    is_normal = (rounded.abs() >= _LEAST_HALF) & rounded.isfinite()
    return torch.where(is_normal, rounded, factor)
