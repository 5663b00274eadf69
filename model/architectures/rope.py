"""Rotary position embedding: the frequencies of the pairs of dimensions and the table of angles.

The embedding is RoFormer's (arXiv:2104.09864). Its extensions to longer contexts: linear, that
is position interpolation (arXiv:2306.15595); llama3 (the Llama 3.1 model, by wavelength); yarn
(arXiv:2309.00071); dynamic (NTK-aware, with a base that grows with the text). Applying it is
`Ops.apply_rope`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.architectures.arch import RopeSpec


def cos_sin_table(
    spec: RopeSpec, max_positions: int, frequency_factors: Tensor | None = None
) -> Tensor:
    """Return float32 `[max_positions, rotary_dim]`: cosines, then sines, of each position.

    The attention factor is folded in. `frequency_factors` `[rotary_dim / 2]`, which a GGUF brings
    in place of llama3's numbers, divide the frequencies.
    """
    frequencies = inverse_frequencies(spec, max_positions)
    if frequency_factors is not None:
        frequencies = frequencies / frequency_factors
    table = torch.empty(max_positions, spec.rotary_dim)
    # In place: the table of a long context is large, and memory for a second one is not planned.
    cosines, sines = table.chunk(2, dim=1)
    torch.mul(torch.arange(max_positions, dtype=torch.float32)[:, None], frequencies, out=sines)
    torch.cos(sines, out=cosines)
    sines.sin_()
    factor = attention_factor(spec)
    return table if factor == 1 else table.mul_(factor)


def late_frequencies(
    spec: RopeSpec, num_held: int, frequency_factors: Tensor | None = None
) -> Tensor:
    """Return float64 `[rotary_dim / 2]`: radians a position, behind a table of `num_held`.

    A float32 has too few digits for the angle of a late position.
    """
    frequencies = inverse_frequencies(spec, num_held).double()
    return frequencies if frequency_factors is None else frequencies / frequency_factors


def cos_sin_rows(spec: RopeSpec, table: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Return the rows of these positions, some of which may be behind the end of their table.

    `frequencies` are those of `late_frequencies`. On a GPU this does not wait for the device.
    """
    angles = positions[:, None].double() * frequencies
    late = torch.cat((angles.cos(), angles.sin()), dim=1).mul_(attention_factor(spec)).float()
    held = table[positions.clamp(max=len(table) - 1)]
    return torch.where((positions < len(table))[:, None], held, late)


def inverse_frequencies(spec: RopeSpec, max_positions: int = 0) -> Tensor:
    """Return float32 `[rotary_dim / 2]`: radians a position, the fastest first.

    Only dynamic's depend on `max_positions`, the length of the longest text.
    """
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim
    frequencies = 1.0 / spec.theta**exponents
    match spec.variant:
        case "default":
            return frequencies
        case "dynamic":
            return 1.0 / _dynamic_theta(spec, max_positions) ** exponents
        case "linear":
            return frequencies / spec.factor
        case "llama3":
            return _llama3(spec, frequencies)
        case "yarn":
            return _yarn(spec, frequencies)


def attention_factor(spec: RopeSpec) -> float:
    """Return the factor on cosines and sines (only yarn's is not 1, equation 22 of its paper)."""
    if spec.variant != "yarn":
        return 1.0
    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.mscale and spec.mscale_all_dim:
        return spec.magnitude(spec.mscale) / spec.magnitude(spec.mscale_all_dim)
    return spec.magnitude(1.0)


def _dynamic_theta(spec: RopeSpec, max_positions: int) -> float:
    stretch = max(max_positions / spec.original_max_positions, 1.0)
    grown = spec.factor * stretch - (spec.factor - 1)
    return float(spec.theta * grown ** (spec.rotary_dim / (spec.rotary_dim - 2)))


def _llama3(spec: RopeSpec, frequencies: Tensor) -> Tensor:
    """Keep short wavelengths, stretch long ones, and blend in between."""
    wavelengths = 2 * math.pi / frequencies
    turns = spec.original_max_positions / wavelengths
    span = spec.high_freq_factor - spec.low_freq_factor
    kept = ((turns - spec.low_freq_factor) / span).clamp(0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / spec.factor


def _yarn(spec: RopeSpec, frequencies: Tensor) -> Tensor:
    """Keep frequencies of more than `beta_fast` turns, stretch those of less than `beta_slow`."""

    def dimension_of(turns: float) -> float:
        context = spec.original_max_positions / (turns * 2 * math.pi)
        return spec.rotary_dim * math.log(context) / (2 * math.log(spec.theta))

    low, high = dimension_of(spec.beta_fast), dimension_of(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    if low == high:
        high += 0.001  # a step is the limit of a ramp
    stretched = ((torch.arange(len(frequencies)) - low) / (high - low)).clamp(0.0, 1.0)
    return stretched * frequencies / spec.factor + (1 - stretched) * frequencies
