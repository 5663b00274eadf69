"""How keys and values are stored: the encoding of a vector, and the planes that pages consist of.

Knows nothing of devices, of the number of pages or of attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from model.kv.codes import (
    Plane,
    decode_int4,
    decode_int8,
    decode_latent,
    decode_scaled,
    encode_fp8,
    encode_int4,
    encode_int8,
    encode_latent,
    num_latent_scales,
)
from model.kv.page_codes import PageCoding


@dataclass(frozen=True, slots=True)
class Coding:
    """An encoding that rounds vectors to codes, each vector by itself."""

    #: From vectors `[..., dim]` to codes and scales.
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    #: From codes and scales to float32.
    decode: Callable[[Tensor, Tensor], Tensor]
    #: Whether codes are of vectors after `hadamard`: kernels rotate queries and results, too.
    is_rotated: bool = False
    #: Elements that an element of the plane of codes holds.
    packed: int = 1
    #: bfloat16 numbers of a vector, behind each other: `()` is one, without a dimension of its own.
    scales_shape: tuple[int, ...] = ()
    #: Last elements of a vector without codes: they are bfloat16, behind the scales.
    num_floats: int = 0


@dataclass(frozen=True, slots=True)
class KVFormat:
    """An encoding of keys and values."""

    #: As `--kv-cache-dtype` has it.
    name: str
    #: Dtype of the elements: floats, or codes.
    storage: torch.dtype
    #: None: elements are floats.
    coding: Coding | None = None
    #: Where the tokens of a page are encoded together.
    page_coding: PageCoding | None = None

    @property
    def can_share_heads(self) -> bool:
        """Return whether the first tokens of a page keep their meaning in another page."""
        return self.page_coding is None

    @property
    def default_page_tokens(self) -> int:
        """Return the tokens of a page by default: many where they share scales."""
        return 16 if self.page_coding is None else 64

    def planes(self, dim: int) -> list[Plane]:
        """Return the planes of a vector: elements, and scales where there are codes."""
        if self.coding is None:
            return [((dim,), self.storage)]
        if dim % self.coding.packed:
            raise ValueError(
                f"kv_cache_dtype {self.name} needs heads of a multiple of {self.coding.packed} "
                f"elements, got {dim}"
            )
        codes = ((dim - self.coding.num_floats) // self.coding.packed,), self.storage
        return [codes, (self.coding.scales_shape, torch.bfloat16)]

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return `[..., dim]` as it is stored: a tensor for each of the `planes`."""
        return (x.to(self.storage),) if self.coding is None else self.coding.encode(x)

    def decode(self, elements: Tensor, *scales: Tensor) -> Tensor:
        """Return the vectors of these planes: floats as they are stored, codes as float32."""
        return elements if self.coding is None else self.coding.decode(elements, *scales)


def float_format(dtype: torch.dtype) -> KVFormat:
    """Return the format that stores elements of this dtype as they are."""
    return KVFormat(str(dtype).removeprefix("torch."), dtype)


FLOAT_FORMATS = tuple(map(float_format, (torch.float32, torch.float16, torch.bfloat16)))
#: One or two scales for each token and head, from its own elements: no calibration.
CODED_FORMATS = (
    KVFormat("int8", torch.int8, Coding(encode_int8, decode_int8, is_rotated=True)),
    KVFormat("fp8", torch.float8_e4m3fn, Coding(encode_fp8, decode_scaled)),
    KVFormat(
        "int4",
        torch.uint8,
        Coding(encode_int4, decode_int4, is_rotated=True, packed=2, scales_shape=(2,)),
    ),
)
#: By pages.
PAGE_FORMATS = (
    KVFormat("kivi4", torch.uint8, page_coding=PageCoding(bits=4, group=64)),
    KVFormat("kivi2", torch.uint8, page_coding=PageCoding(bits=2, group=32)),
)
#: By name.
KV_FORMATS: Mapping[str, KVFormat] = MappingProxyType(
    {one.name: one for one in (*FLOAT_FORMATS, *CODED_FORMATS, *PAGE_FORMATS)}
)


@cache
def _latent_format(kv_format: KVFormat, latent_dim: int, dim: int) -> KVFormat:
    """Return a format for latent vectors with a rotated one behind them, `dim` elements in all.

    Codes are of the latent elements alone. The others are few, and lose most by rounding.
    """
    if kv_format in FLOAT_FORMATS:
        return kv_format
    if kv_format.name != "int8":
        raise ValueError(
            f"kv_cache_dtype {kv_format.name} is not supported with latent attention; "
            "the nearest is int8"
        )
    num_floats = dim - latent_dim
    coding = Coding(
        partial(encode_latent, latent_dim=latent_dim),
        partial(decode_latent, latent_dim=latent_dim),
        scales_shape=(num_latent_scales(latent_dim) + num_floats,),
        num_floats=num_floats,
    )
    return replace(kv_format, coding=coding)


class LayerPages(NamedTuple):
    """The planes of one layer, each `[num_pages, page_size, kv_heads, ...]`."""

    #: `[..., head_dim]`, contiguous; with two codes a byte `[..., head_dim / 2]`.
    keys: Tensor
    #: As `keys`; with a latent layout the first elements of the keys.
    values: Tensor
    #: Of the keys, then of the values, where the format has codes. Of pages that are encoded as a
    #: whole those of the keys are `[num_pages, kv_heads, head_dim, 2]`.
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
    #: Of the layers whose pages are in another format.
    other_formats: Mapping[int, KVFormat] = field(default_factory=dict)

    def format_of(self, layer: int) -> KVFormat:
        """Return the format of a layer's pages."""
        kv_format = self.other_formats.get(layer, self.format)
        if self.latent_dim is None:
            return kv_format
        return _latent_format(kv_format, self.latent_dim, self.head_dim)

    def planes(self, layer: int) -> list[Plane]:
        """Return the shape of a page and the dtype, for each plane of a layer."""
        tokens, kv_format = (self.page_size, self.num_kv_heads), self.format_of(layer)
        if kv_format.page_coding is not None:
            return kv_format.page_coding.planes(*tokens, self.head_dim)
        planes: list[Plane] = [
            ((*tokens, *vector), dtype) for vector, dtype in kv_format.planes(self.head_dim)
        ]
        return planes if self.latent_dim else [plane for plane in planes for _ in range(2)]

    def layers_by_format(self) -> dict[KVFormat, list[int]]:
        """Return the layers of each format."""
        found: dict[KVFormat, list[int]] = {}
        for layer in range(self.num_layers):
            found.setdefault(self.format_of(layer), []).append(layer)
        return found

    @property
    def bytes_per_page(self) -> int:
        """Return the bytes of a page, in all layers."""
        return sum(
            math.prod(shape) * dtype.itemsize
            for layer in range(self.num_layers)
            for shape, dtype in self.planes(layer)
        )

    def split(self, planes: list[Tensor]) -> LayerPages:
        """Name the planes of a layer."""
        if self.latent_dim:
            return LayerPages(planes[0], planes[0][..., : self.latent_dim], tuple(planes[1:]))
        return LayerPages(planes[0], planes[1], tuple(planes[2:]))
