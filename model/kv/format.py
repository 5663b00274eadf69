"""How keys and values are stored: the encoding of a vector, and the planes that pages consist of.

Knows nothing of devices, of the number of pages or of attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVFormat:
    """An encoding of keys and values."""

    #: As `--kv-cache-dtype` has it.
    name: str
    #: Dtype of the elements: floats, or codes.
    storage: torch.dtype
    #: Dtype of the scale that the codes of a token and head share; None: there are no scales.
    scale: torch.dtype | None = None
    #: Tokens that are encoded together.
    group_tokens: int = 1

    @property
    def can_share_heads(self) -> bool:
        """Return whether the first tokens of a page keep their meaning in another page."""
        return self.group_tokens == 1


def float_format(dtype: torch.dtype) -> KVFormat:
    """Return the format that stores elements of this dtype as they are."""
    return KVFormat(str(dtype).removeprefix("torch."), dtype)


_FLOATS = tuple(map(float_format, (torch.float32, torch.float16, torch.bfloat16)))
#: By name.
KV_FORMATS: Mapping[str, KVFormat] = MappingProxyType({one.name: one for one in _FLOATS})


class LayerPages(NamedTuple):
    """The planes of one layer, each `[num_pages, page_size, kv_heads, ...]`."""

    #: `[..., head_dim]`, contiguous.
    keys: Tensor
    #: As `keys`; with a latent layout the first elements of the keys.
    values: Tensor
    #: Of the keys, then of the values, where the format has scales.
    scales: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of the pages of all layers."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    format: KVFormat
    #: Elements of a value that are the first elements of its key, as in multi-head latent
    #: attention: there is one plane. None: values have a plane of their own, as wide as the keys'.
    latent_dim: int | None = None

    @property
    def planes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape of a page and the dtype, for each plane of a layer."""
        tokens = self.page_size, self.num_kv_heads
        planes: list[tuple[tuple[int, ...], torch.dtype]]
        planes = [((*tokens, self.head_dim), self.format.storage)]
        if self.format.scale is not None:
            planes.append((tokens, self.format.scale))
        return planes if self.latent_dim else [plane for plane in planes for _ in range(2)]

    @property
    def bytes_per_page(self) -> int:
        """Return the bytes of a page, in all layers."""
        return self.num_layers * sum(
            math.prod(shape) * dtype.itemsize for shape, dtype in self.planes
        )

    def split(self, planes: list[Tensor]) -> LayerPages:
        """Name the planes of a layer."""
        if self.latent_dim:
            return LayerPages(planes[0], planes[0][..., : self.latent_dim], tuple(planes[1:]))
        return LayerPages(planes[0], planes[1], tuple(planes[2:]))
