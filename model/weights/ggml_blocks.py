"""Unpacks blocks of GGUF files into their integers, without rounding.

The layouts are those of ggml's `block_*` types (ggml-common.h). `scale * code + minimum` gives the
values of `gguf.dequantize` to the bit. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Codes `[blocks, values]`; float32 scales `[blocks, groups]`, and minimums or None.
Unpacked = tuple[Tensor, Tensor, Tensor | None]

_WORD_BYTES, _ONES = 8, 0x0101010101010101


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of blocks whose values are evenly spaced integers."""

    block_bytes: int
    bits: int
    group_inputs: int
    #: From uint8 `[blocks, bytes of a block]`.
    unpack: Callable[[Tensor], Unpacked]
    #: With minimums codes are uint8, otherwise int8 around zero.
    has_minimums: bool = False


def _float(blocks: Tensor, at: int) -> Tensor:
    """Return the half at a byte of each block as float32 `[blocks, 1]`."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _split(packed: Tensor, bits: int, run: int) -> Tensor:
    """Split bytes into numbers of so many bits, uint8 `[blocks, numbers]`.

    The lowest bits of `run` bytes come first, then the next bits of the same bytes.
    """
    # Eight bytes at a time, if a run has them: the mask removes the bits of neighbours.
    dtype, mask = torch.uint8, 2**bits - 1
    if run % _WORD_BYTES == 0:
        dtype, mask = torch.int64, mask * _ONES
    words = packed.contiguous().view(dtype)
    # Operations on whole tensors: with a dimension of shifts, loops would have two elements.
    numbers = [words >> shift & mask for shift in range(0, 8, bits)]
    runs = [torch.unflatten(one, 1, (-1, run // dtype.itemsize)) for one in numbers]
    return torch.stack(runs, dim=2).flatten(1).view(torch.uint8)


def _around_zero(codes: Tensor, bits: int) -> Tensor:
    return codes.sub_(2 ** (bits - 1)).view(torch.int8)


def _q8_0(blocks: Tensor) -> Unpacked:
    return blocks[:, 2:].view(torch.int8), _float(blocks, 0), None


def _q4_0(blocks: Tensor) -> Unpacked:
    return _around_zero(_split(blocks[:, 2:], 4, 16), 4), _float(blocks, 0), None


def _q4_1(blocks: Tensor) -> Unpacked:
    return _split(blocks[:, 4:], 4, 16), _float(blocks, 0), _float(blocks, 2)


def _five_bits(blocks: Tensor, at: int) -> Tensor:
    high = _split(blocks[:, at : at + 4], 1, 1)
    return _split(blocks[:, at + 4 :], 4, 16) | high << 4


def _q5_0(blocks: Tensor) -> Unpacked:
    return _around_zero(_five_bits(blocks, 2), 5), _float(blocks, 0), None


def _q5_1(blocks: Tensor) -> Unpacked:
    return _five_bits(blocks, 4), _float(blocks, 0), _float(blocks, 2)


def _scales_of_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eight scales and minimums of Q4_K and Q5_K, which have six bits in a block."""
    low, middle, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((low & 63, rest & 15 | low >> 2 & 48), dim=1)
    minimums = torch.cat((middle & 63, rest >> 4 | middle >> 2 & 48), dim=1)
    return _float(blocks, 0) * scales, -(_float(blocks, 2) * minimums)


def _q4_k(blocks: Tensor) -> Unpacked:
    return (_split(blocks[:, 16:], 4, 32), *_scales_of_k(blocks))


def _q5_k(blocks: Tensor) -> Unpacked:
    high = _split(blocks[:, 16:48], 1, 32)
    return (_split(blocks[:, 48:], 4, 32) | high << 4, *_scales_of_k(blocks))


def _q6_k(blocks: Tensor) -> Unpacked:
    codes = _split(blocks[:, :128], 4, 64) | _split(blocks[:, 128:192], 2, 32) << 4
    scales = _float(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    return _around_zero(codes, 6), scales, None


#: By ggml's names.
BLOCK_TYPES = {
    "Q8_0": BlockType(34, 8, 32, _q8_0),
    "Q4_0": BlockType(18, 4, 32, _q4_0),
    "Q4_1": BlockType(20, 4, 32, _q4_1, has_minimums=True),
    "Q5_0": BlockType(22, 5, 32, _q5_0),
    "Q5_1": BlockType(24, 5, 32, _q5_1, has_minimums=True),
    "Q4_K": BlockType(144, 4, 32, _q4_k, has_minimums=True),
    "Q5_K": BlockType(176, 5, 32, _q5_k, has_minimums=True),
    "Q6_K": BlockType(210, 6, 16, _q6_k),
}
