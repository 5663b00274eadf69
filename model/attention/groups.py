"""Attention of a model whose windowed layers have pages of their own: a backend for each group.

Each of the two has its own pool and block tables, and knows its own layers alone. So any backend
serves, and none reads behind the widest window of its layers. Knows nothing of how either attends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.attention.interface import AttentionBackend, AttentionBatch, AttentionSpec, BackendOffer
from model.kv.pool import KVPool


class LayerGroups(NamedTuple):
    """The layers of each group, ascending."""

    full: tuple[int, ...]
    windowed: tuple[int, ...]


def layer_groups(spec: AttentionSpec) -> LayerGroups:
    """Divide the layers into those without a window and those with one."""
    layers = range(spec.num_layers)
    return LayerGroups(
        tuple(layer for layer in layers if spec.windows[layer] is None),
        tuple(layer for layer in layers if spec.windows[layer] is not None),
    )


class GroupedAttention:
    """See `AttentionBackend`."""

    def __init__(
        self, groups: LayerGroups, full: AttentionBackend, windowed: AttentionBackend
    ) -> None:
        self.name = full.name
        self.full, self.windowed = full, windowed
        parts = {layer: (full, index) for index, layer in enumerate(groups.full)}
        parts |= {layer: (windowed, index) for index, layer in enumerate(groups.windowed)}
        #: Of each layer: the backend that has its pages, and the number of the layer there.
        self.parts = [parts[layer] for layer in range(len(parts))]

    def plan(self, batch: AttentionBatch) -> None:
        """See `AttentionBackend`."""
        assert batch.windowed is not None, "a batch without the pages of the windowed layers"
        self.full.plan(batch)
        self.windowed.plan(batch.windowed)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sink_q: Tensor | None = None
    ) -> Tensor:
        """See `AttentionBackend`."""
        part, index = self.parts[layer]
        return part.attend(index, q, k, v, sink_q)


def part_of(attention: AttentionBackend, layer: int) -> tuple[AttentionBackend, int]:
    """Return the backend that has a layer's pages, and the number of the layer there."""
    return attention.parts[layer] if isinstance(attention, GroupedAttention) else (attention, layer)


class PagedParts(NamedTuple):
    """A backend and its pages."""

    attention: AttentionBackend
    pool: KVPool
    #: Of the windowed layers, where these have pages of their own.
    windowed_pool: KVPool | None = None


def build_parts(
    offer: BackendOffer,
    spec: AttentionSpec,
    page_size: int,
    num_pages: int,
    num_windowed_pages: int | None,
    device: torch.device,
) -> PagedParts:
    """Build a backend with its pages. `num_windowed_pages` of None: all layers have the same."""
    if num_windowed_pages is None:
        pool = KVPool(spec.layout(page_size), num_pages, device)
        return PagedParts(offer.build(spec, pool), pool)
    groups = layer_groups(spec)
    specs = [spec.of_layers(layers) for layers in groups]
    pools = [
        KVPool(one.layout(page_size), count, device)
        for one, count in zip(specs, (num_pages, num_windowed_pages), strict=True)
    ]
    full, windowed = map(offer.build, specs, pools)
    return PagedParts(GroupedAttention(groups, full, windowed), *pools)
