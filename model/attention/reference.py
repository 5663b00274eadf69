"""Attention by its definition, row by row in plain torch: the oracle of the other backends.

Runs on any device, slowly. Knows nothing of the layout of pages: it stores and loads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention.interface import AttentionBatch, AttentionSpec, BackendOffer
from model.kv.format import KV_FORMATS
from model.kv.pool import KVPool


class ReferenceAttention:
    """See `AttentionBackend`. `softmax_dtype` is that of everything between loads and result."""

    name = "reference"

    def __init__(
        self, spec: AttentionSpec, pool: KVPool, softmax_dtype: torch.dtype = torch.float32
    ) -> None:
        self._spec = spec
        self._pool = pool
        self._dtype = softmax_dtype
        self._batch: AttentionBatch | None = None

    def plan(self, batch: AttentionBatch) -> None:
        """See `AttentionBackend`."""
        self._batch = batch

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `AttentionBackend`."""
        batch = self._batch
        assert batch is not None, "attend before plan"
        self._pool.store(layer, batch.kv_slots, k, v)
        shape = len(q), self._spec.num_heads, self._spec.value_dim
        out = torch.empty(shape, dtype=q.dtype, device=q.device)
        starts, ends = batch.query_starts.tolist(), batch.seq_lens.tolist()
        for row, num_keys in enumerate(ends):
            mine = slice(starts[row], starts[row + 1])
            slots = self._slots(
                batch.block_table[row], num_keys, starts[row + 1] - starts[row], layer
            )
            out[mine] = self._attend_row(q[mine], *self._pool.load(layer, slots), layer)
        return out.flatten(1)

    def _slots(self, pages: Tensor, num_keys: int, num_queries: int, layer: int) -> Tensor:
        """Return the slots of a row's keys; behind the window, that of the oldest key in it."""
        window = self._spec.windows[layer] or num_keys
        oldest = max(num_keys - num_queries - window + 1, 0)
        key_at = torch.arange(num_keys, device=pages.device).clamp(min=oldest)
        page_size = self._pool.layout.page_size
        return pages[key_at // page_size].long() * page_size + key_at % page_size

    def _attend_row(self, q: Tensor, keys: Tensor, values: Tensor, layer: int) -> Tensor:
        """Attend the last of `[keys, kv_heads, head_dim]`; returns `[queries, heads, value_dim]`."""
        spec = self._spec
        group = spec.num_heads // spec.num_kv_heads
        wide_keys = keys.to(self._dtype).repeat_interleave(group, dim=1)
        wide_values = values.to(self._dtype).repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q.to(self._dtype), wide_keys) * spec.scale
        key_at = torch.arange(len(keys), device=q.device)
        back = key_at[len(keys) - len(q) :, None] - key_at
        window = spec.windows[layer]
        hidden = (back < 0) if window is None else (back < 0) | (back >= window)
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        scores = scores.masked_fill(hidden, -torch.inf)
        if spec.sinks is not None:
            sink = spec.sinks[layer].to(self._dtype)[:, None, None].expand(-1, len(q), 1)
            scores = torch.cat((scores, sink), dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : len(keys)]
        return torch.einsum("hqk,khd->qhd", weights, wide_values).to(q.dtype)


def offer(spec: AttentionSpec) -> BackendOffer:
    """Offer it for any model on any device."""
    del spec
    return BackendOffer(
        "reference",
        1,
        16,
        ReferenceAttention,
        formats=tuple(KV_FORMATS.values()),
        reads_mixed_layers=True,
    )
