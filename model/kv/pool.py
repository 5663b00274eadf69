"""The bytes of the key/value pages: who is in which page is `cache/`'s business, not known here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cache.moves import PageMove, Tier
from model.kv.arena import Arena
from model.kv.prefault import Foretouch


class KVPool:
    """Keys and values of all layers, in pages: `[num_pages, page_size, kv_heads, head_dim]` each.

    One allocation. On a CPU it is not cleared, so memory is taken as it is first written, and in
    the system's huge pages: a step's keys lie all over the pool. Elsewhere it is cleared, since
    some kernels multiply what lies past a row's end by zero, and zero times NaN is NaN.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, 2, num_pages, page_size, num_kv_heads, head_dim)
        self._foretouch: Foretouch | None = None
        if device.type == "cpu":
            self._layers = Arena().take(shape, dtype)
            self._foretouch = Foretouch(self._layers.flatten(0, 1))
        else:
            self._layers = torch.zeros(shape, dtype=dtype, device=device)
        self.num_pages = num_pages
        self.page_size = page_size

    def keys(self, layer: int) -> Tensor:
        """Keys of a layer, `[num_pages, page_size, kv_heads, head_dim]`, contiguous."""
        return self._layers[layer, 0]

    def values(self, layer: int) -> Tensor:
        """Values of a layer, as `keys`."""
        return self._layers[layer, 1]

    def move_pages(self, moves: Sequence[PageMove]) -> None:
        """Copy the heads of pages, one after another as listed, in all layers.

        One strided copy each: a page may be the source of one move and the target of the next.
        Raises `ValueError` for pages of another tier.
        """
        for move in moves:
            if (move.source.tier, move.target.tier) != (Tier.DEVICE, Tier.DEVICE):
                raise ValueError(f"only pages on the device can be moved, got {move}")
            source = self._layers[:, :, move.source.page_id, : move.num_tokens]
            self._layers[:, :, move.target.page_id, : move.num_tokens] = source

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self._layers.device

    def reach(self, page: int) -> None:
        """Say that a page is in use: memory is then asked for those after it."""
        if self._foretouch is not None:
            self._foretouch.reach(page)

    def idle(self) -> bool:
        """Ask for a little of that memory; whether there is more to be asked for."""
        return self._foretouch is not None and self._foretouch.step()

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored keys and values."""
        return self._layers.dtype

    @property
    def total_bytes(self) -> int:
        """What the pool takes when every page has been written."""
        return self._layers.nbytes

    @staticmethod
    def bytes_per_token(
        num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Bytes that one token takes: a key and a value in each layer."""
        return 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize
