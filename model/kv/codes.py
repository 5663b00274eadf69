"""Codes of keys and values: small integers or 8-bit floats, with a scale for each vector.

A vector is the key or the value of one token and KV head. Each function here is a definition:
kernels write the same bytes, so every operation is in float32, rounded to nearest even where no
direction is stated, and its order counts. No vector depends on another one, so codes depend neither
on the step that writes them nor on the rows beside them.

A vector with an element that is not finite has a scale of NaN: only the rows that read it fail.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Of a plane: the shape of a page, or of a vector in it, and the dtype.
Plane = tuple[tuple[int, ...], torch.dtype]

_LARGEST_INT8 = 127
#: Of float8_e4m3fn.
_LARGEST_FP8 = 448
#: Latent elements that share a scale.
_LATENT_GROUP = 128


def encode_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes `[..., dim]` and bfloat16 scales `[...]` of `[..., dim]`.

    Codes are of the vector after `hadamard`: a channel that is large in all vectors would else make
    the steps of the others coarse.
    """
    return _int8(hadamard(x))


def decode_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """Return float32 `[..., dim]`: code times scale, turned back by `hadamard`."""
    return hadamard(decode_scaled(codes, scales))


def encode_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return float8_e4m3fn codes `[..., dim]` and bfloat16 scales `[...]` of `[..., dim]`."""
    steps, scales = _symmetric(x, _LARGEST_FP8)
    return steps.to(torch.float8_e4m3fn), scales


def decode_scaled(codes: Tensor, scales: Tensor) -> Tensor:
    """Return float32 `[..., dim]`: each code times its vector's scale."""
    return codes.float() * scales.float().unsqueeze(-1)


def encode_latent(x: Tensor, latent_dim: int) -> tuple[Tensor, Tensor]:
    """Return int8 codes `[..., latent_dim]` of the first elements, and bfloat16 beside them.

    These are the scales of groups of codes, then the elements that have no codes. No codes are of
    rotated vectors.
    """
    groups = x[..., :latent_dim].reshape(*x.shape[:-1], num_latent_scales(latent_dim), -1)
    codes, scales = _int8(groups)
    return codes.flatten(-2), torch.cat((scales, x[..., latent_dim:].bfloat16()), -1)


def decode_latent(codes: Tensor, beside: Tensor, latent_dim: int) -> Tensor:
    """Return float32 `[..., dim]` from both results of `encode_latent`."""
    num_scales = num_latent_scales(latent_dim)
    groups = codes.reshape(*codes.shape[:-1], num_scales, -1)
    latent = decode_scaled(groups, beside[..., :num_scales])
    return torch.cat((latent.flatten(-2), beside[..., num_scales:].float()), -1)


def num_latent_scales(latent_dim: int) -> int:
    """Return the scales of a latent vector: one to 128 codes, or to a divisor of it."""
    return latent_dim // math.gcd(latent_dim, _LATENT_GROUP)


def encode_int4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return two codes a byte, uint8 `[..., dim / 2]`, and bfloat16 `[..., 2]`: scale and minimum.

    Codes are of the vector after `hadamard`, as in `encode_int8`. The even element of a pair has
    the low four bits.
    """
    codes, scales = encode_asymmetric(hadamard(x), 4)
    return pack(codes, 4), scales


def decode_int4(codes: Tensor, scales: Tensor) -> Tensor:
    """Return float32 `[..., dim]`: code times scale plus minimum, turned back by `hadamard`."""
    return hadamard(decode_asymmetric(unpack(codes, 4), scales))


def encode_asymmetric(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes, a byte each, `[..., dim]`, and bfloat16 `[..., 2]`: scale and minimum."""
    x, largest = x.float(), 2**bits - 1
    # Adding zero turns -0 into 0: which of the two a minimum is depends on the order of elements.
    least = -bfloat16_up(-x.amin(-1)) + 0.0
    spread = x.amax(-1) - least.float() + 0.0
    # Both roundings widen the range, so that no code lies outside.
    scales = bfloat16_up(spread / torch.full_like(spread, largest))
    is_finite = spread.isfinite()
    scales = scales.masked_fill(~is_finite, torch.nan)
    least = least.masked_fill(~is_finite, 0.0)
    steps = _quotients(x - least.float().unsqueeze(-1), scales)
    return steps.round_().clamp_(0, largest).to(torch.uint8), torch.stack((scales, least), -1)


def decode_asymmetric(codes: Tensor, scales: Tensor) -> Tensor:
    """Return float32 `[..., dim]`: each code times its vector's scale plus the minimum."""
    scale, least = scales.float().unsqueeze(-2).unbind(-1)
    return codes.float() * scale + least


def pack(codes: Tensor, bits: int) -> Tensor:
    """Put neighbouring codes into one byte, the first into its lowest bits."""
    num_parts = 8 // bits
    packed = codes[..., ::num_parts].clone()
    for index in range(1, num_parts):
        packed |= codes[..., index::num_parts] << index * bits
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Return the codes of `pack`, a byte each."""
    parts = [packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2)


def hadamard(x: Tensor) -> Tensor:
    """Return float32: each vector times an orthonormal Hadamard matrix, its own inverse.

    Blocks are as long as the largest power of two that divides the vector. Elements at distance 1
    become sum and difference first, then those at distance 2, 4 and so on; the factor comes last.

    Queries that are rotated too have the same scores with rotated keys. So a backend that reads
    codes in place calls this on its queries, and once on its results for the values.
    """
    dim = x.shape[-1]
    block = dim & -dim
    y, distance = x.float(), 1
    while distance < block:
        pairs = y.reshape(*x.shape[:-1], dim // (2 * distance), 2, distance)
        left, right = pairs.unbind(-2)
        y = torch.stack((left + right, left - right), -2).flatten(-3)
        distance *= 2
    factor: float = block**-0.5
    return y * factor


def bfloat16_up(x: Tensor) -> Tensor:
    """Return finite float32 rounded to bfloat16 towards +inf."""
    bits = x.view(torch.int32)
    # Cutting off the lower bits of a negative number is up already.
    return (torch.where(bits < 0, bits, bits + 0xFFFF) & ~0xFFFF).view(torch.float32).bfloat16()


def _int8(x: Tensor) -> tuple[Tensor, Tensor]:
    steps, scales = _symmetric(x, _LARGEST_INT8)
    return steps.round_().to(torch.int8), scales


def _symmetric(x: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Return each vector in steps of its scale, within `largest`, and the scales."""
    x = x.float()
    most = x.abs().amax(-1)
    # By a tensor: on CUDA torch divides by a number through its reciprocal.
    scales = bfloat16_up(most / torch.full_like(most, largest))
    scales = scales.masked_fill(~most.isfinite(), torch.nan)
    return _quotients(x, scales).clamp_(-largest, largest), scales


def _quotients(x: Tensor, scales: Tensor) -> Tensor:
    """Return each vector divided by its scale; zeros where that is zero or NaN."""
    wide = scales.float().unsqueeze(-1)
    return (x / wide).masked_fill_(~(wide > 0), 0.0)
