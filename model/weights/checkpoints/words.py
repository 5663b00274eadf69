"""Unpacks small integers from 32-bit words, the lowest bits first."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return the uint8 codes of int32 `[rows, words]`: `[rows, words * 32 / bits]`; 4 or 8 bits."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)
