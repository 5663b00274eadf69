"""The bytes of the key/value pages. Knows nothing of which tokens a page holds (`cache/`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from cache.moves import PageMove, Tier
from model.kv.arena import Arena
from model.kv.format import KVLayout, LayerPages
from model.kv.prefault import Prefault


class KVPool:
    """Pages of keys and values, for all layers.

    On a CPU the memory is not cleared: the system supplies it at the first write, in huge pages,
    since the keys of a step are scattered over the pool. On other devices it is cleared: some
    kernels multiply the elements past a row's end by zero, and zero times NaN is NaN.
    """

    def __init__(self, layout: KVLayout, num_pages: int, device: torch.device) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.device = device
        is_cpu = device.type == "cpu"
        take: Callable[..., Tensor] = (
            Arena().take if is_cpu else partial(torch.zeros, device=device)
        )
        #: `[layers of one format, num_pages, page_size, ...]` each: in one copy a page moves in all
        #: of these layers.
        self._planes: list[Tensor] = []
        #: Of each layer, `[num_pages, page_size, ...]`.
        self._layer_planes: list[list[Tensor]] = [[] for _ in range(layout.num_layers)]
        for layers in layout.layers_by_format().values():
            for page, dtype in layout.planes(layers[0]):
                plane = take((len(layers), num_pages, *page), dtype=dtype)
                self._planes.append(plane)
                for layer, part in zip(layers, plane, strict=True):
                    self._layer_planes[layer].append(part)
        self._layers = list(map(layout.split, self._layer_planes))
        self._prefault = Prefault(chain.from_iterable(self._planes)) if is_cpu else None

    def pages(self, layer: int) -> LayerPages:
        """Return a layer's planes, for kernels that read the layout themselves."""
        return self._layers[layer]

    def store(self, layer: int, kv_slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write `[tokens, kv_heads, dim]` keys and values; a slot is page * page_size + offset."""
        encode = self.layout.format_of(layer).encode
        # By planes, as they lie: elements of the keys, of the values, then scales.
        sides = zip(*map(encode, (k,) if self.layout.latent_dim else (k, v)), strict=True)
        for plane, new in zip(self._layer_planes[layer], chain.from_iterable(sides), strict=True):
            _indexable(plane).flatten(0, 1).index_copy_(0, kv_slots, _indexable(new))

    def load(self, layer: int, kv_slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of some slots, `[slots, kv_heads, dim]` each.

        Codes become float32.
        """
        kv_format, latent_dim = self.layout.format_of(layer), self.layout.latent_dim
        # index_select: two to ten times faster than indexing, measured on a CPU.
        planes = [
            _indexable(plane).flatten(0, 1).index_select(0, kv_slots).view(plane.dtype)
            for plane in self._layer_planes[layer]
        ]
        if latent_dim:
            keys = kv_format.decode(*planes)
            return keys, keys[..., :latent_dim]
        return kv_format.decode(*planes[0::2]), kv_format.decode(*planes[1::2])

    def keep(self, layer: int, kv_slots: Tensor, kept: Tensor, to_slots: Tensor) -> None:
        """Move some tokens' keys and values, of each KV head others: as they are, codes too.

        `kept`: int64 `[tokens, kv_heads]`, which of `kv_slots` a head takes to `to_slots`, int64
        `[tokens]`. All are read before any is written, so that both may be in the same pages.
        """
        for plane in map(_indexable, self._layer_planes[layer]):
            flat = plane.flatten(0, 1)
            index = kept.view(*kept.shape, *(1,) * (flat.dim() - 2)).expand(-1, -1, *flat.shape[2:])
            flat.index_copy_(0, to_slots, flat.index_select(0, kv_slots).gather(0, index))

    def store_pages(self, layer: int, page_ids: Tensor, k: Tensor, v: Tensor) -> None:
        """Encode whole pages from the first of `[tokens, kv_heads, dim]`, by `page_coding`."""
        coding, page_size = self.layout.format_of(layer).page_coding, self.layout.page_size
        assert coding is not None, "a format of single tokens"
        whole = (len(page_ids), page_size, *k.shape[1:])
        pages = [one[: len(page_ids) * page_size].reshape(whole) for one in (k, v)]
        for plane, new in zip(self._layer_planes[layer], coding.encode(*pages), strict=True):
            plane.index_copy_(0, page_ids, new)

    def load_pages(self, layer: int, page_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of whole pages, `[tokens, kv_heads, dim]` each."""
        coding = self.layout.format_of(layer).page_coding
        assert coding is not None, "a format of single tokens"
        planes = [plane.index_select(0, page_ids) for plane in self._layer_planes[layer]]
        keys, values = coding.decode(*planes)
        return keys.flatten(0, 1), values.flatten(0, 1)

    def move_pages(self, moves: Sequence[PageMove]) -> None:
        """Copy the first tokens of pages, one move after another, in all layers.

        A page may be the source of one move and the target of the next. Raises `ValueError` for
        pages of another tier, and for the head of a page that is encoded as a whole.
        """
        is_whole = any(not one.can_share_heads for one in self.layout.layers_by_format())
        for move in moves:
            if (move.source.tier, move.target.tier) != (Tier.DEVICE, Tier.DEVICE):
                raise ValueError(f"only pages on the device can be moved, got {move}")
            if is_whole and move.num_tokens < self.layout.page_size:
                raise ValueError(f"pages of this format have no heads of their own, got {move}")
            source, target = move.source.page_id, move.target.page_id
            # The scales of a whole page are not in the order of its tokens.
            head = slice(None) if is_whole else slice(move.num_tokens)
            for plane in self._planes:
                plane[:, target, head] = plane[:, source, head]

    def take_step(self, tables: Sequence[Sequence[int]], moves: Sequence[PageMove]) -> None:
        """Do a step's moves. The memory of the pages after those in use is requested ahead."""
        self.reach(max(page_ids[-1] for page_ids in tables))
        self.move_pages(moves)

    def read_page(self, page: int) -> memoryview:
        """Return the contents of a page, plane after plane, as `bytes_per_page` bytes."""
        parts = [_bytes_of(plane[:, page]) for plane in self._planes]
        return torch.cat(parts).cpu().numpy().data

    def write_page(self, page: int, contents: memoryview) -> None:
        """Replace the contents of a page by a result of `read_page`."""
        if self._prefault is not None:
            self._prefault.reach(page)
        rest = torch.frombuffer(contents, dtype=torch.uint8)
        for plane in self._planes:
            target = plane[:, page]
            num_bytes = target.numel() * target.itemsize
            # A copy, since a view of another dtype needs an aligned start.
            part, rest = rest[:num_bytes].clone(), rest[num_bytes:]
            target.copy_(part.view(target.dtype).view(target.shape))
        assert not len(rest), "the contents of a page of another layout"

    def reach(self, page: int) -> None:
        """Mark a page as used: the memory of the pages after it is then requested ahead."""
        if self._prefault is not None:
            self._prefault.reach(page)

    def idle(self) -> bool:
        """Request a little of that memory; return whether there is more to request."""
        return self._prefault is not None and self._prefault.step()


def _bytes_of(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def _indexable(x: Tensor) -> Tensor:
    """Return 8-bit floats, which torch does not index by slots, as bytes."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
