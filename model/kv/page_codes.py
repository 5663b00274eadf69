"""Codes of whole pages, as in KIVI (arXiv:2402.02750): keys by channel, values by token.

A few channels of the keys are large in all tokens, so each channel of a page has a scale and a
minimum of its own. Values have no such pattern: each token has them, for groups of its elements.
So a page is encoded when its last token is there. As in `model/kv/codes.py` this is a definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from model.kv.codes import Plane, decode_asymmetric, encode_asymmetric, pack, unpack


@dataclass(frozen=True, slots=True)
class PageCoding:
    """An encoding that rounds the keys and the values of a page to codes, together."""

    #: Of a code: 2 or 4.
    bits: int
    #: Elements of a value that share a scale, at most.
    group: int

    def planes(self, page_size: int, num_kv_heads: int, dim: int) -> list[Plane]:
        """Return the planes of a page: codes of keys and values, scales of keys and values."""
        per_byte, group = 8 // self.bits, gcd(dim, self.group)
        if dim % per_byte:
            raise ValueError(
                f"kv_cache_dtype kivi{self.bits} needs heads of a multiple of {per_byte} elements, "
                f"got {dim}"
            )
        codes = (page_size, num_kv_heads, dim // per_byte), torch.uint8
        key_scales = (num_kv_heads, dim, 2), torch.bfloat16
        value_scales = (page_size, num_kv_heads, dim // group, 2), torch.bfloat16
        return [codes, codes, key_scales, value_scales]

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Return the planes of `[pages, page_size, kv_heads, dim]`, all with the pages in front."""
        # By channel: the tokens come last.
        key_codes, key_scales = encode_asymmetric(keys.permute(0, 2, 3, 1), self.bits)
        dim = values.shape[-1]
        group = gcd(dim, self.group)
        groups = values.reshape(*values.shape[:-1], dim // group, group)
        value_codes, value_scales = encode_asymmetric(groups, self.bits)
        return (
            pack(key_codes.permute(0, 3, 1, 2), self.bits),
            pack(value_codes.flatten(-2), self.bits),
            key_scales,
            value_scales,
        )

    def decode(
        self, keys: Tensor, values: Tensor, key_scales: Tensor, value_scales: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values `[pages, page_size, kv_heads, dim]`, rounded to bfloat16."""
        by_channel = unpack(keys, self.bits).permute(0, 2, 3, 1)
        codes = unpack(values, self.bits)
        num_groups = value_scales.shape[-2]
        groups = codes.view(*codes.shape[:-1], num_groups, codes.shape[-1] // num_groups)
        return (
            decode_asymmetric(by_channel, key_scales).permute(0, 3, 1, 2).bfloat16(),
            decode_asymmetric(groups, value_scales).flatten(-2).bfloat16(),
        )
