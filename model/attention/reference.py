"""Attention by its definition, row by row in plain torch: the oracle of the other backends.

Runs on any device, slowly. Knows nothing of the layout of pages: it stores and loads.

Where pages are encoded as a whole, a query reads the tokens of its own page in full precision, and
all pages before it as codes. So the form of a key depends on the positions of key and query alone,
not on the step that computes either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention.interface import AttentionBatch, AttentionSpec, BackendOffer
from model.kv.desks import Desks, OpenPages
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
        self._page_size = pool.layout.page_size
        self._desks = Desks(self._page_size, spec.max_draft_tokens)

    def plan(self, batch: AttentionBatch) -> None:
        """See `AttentionBackend`."""
        self._batch = batch

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sink_q: Tensor | None = None
    ) -> Tensor:
        """See `AttentionBackend`."""
        batch = self._batch
        assert batch is not None, "attend before plan"
        shape = len(q), self._spec.num_heads, self._spec.value_dim
        out = torch.empty(shape, dtype=q.dtype, device=q.device)
        starts, ends = batch.query_starts.tolist(), batch.seq_lens.tolist()
        if self._pool.layout.format_of(layer).page_coding is not None:
            for row, (slot, end) in enumerate(zip(batch.slots, ends, strict=True)):
                mine = slice(starts[row], starts[row + 1])
                first = end - starts[row + 1] + starts[row]
                pages = self._desks.add(layer, slot, first, k[mine], v[mine])
                table = batch.block_table[row].long()
                # First: the queries of a page read the pages before it as codes.
                whole = table[pages.first_page :][: len(pages.keys) // self._page_size]
                self._pool.store_pages(layer, whole, pages.keys, pages.values)
                out[mine] = self._attend_pages(q[mine], pages, table, layer)
            return out.flatten(1)
        self._pool.store(layer, batch.kv_slots, k, v)
        for row, num_keys in enumerate(ends):
            mine = slice(starts[row], starts[row + 1])
            if batch.views is not None and batch.views.max_keys(row) < num_keys:
                out[mine] = self._attend_in_view(
                    row, layer, q[mine], None if sink_q is None else sink_q[mine]
                )
                continue
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
        page_size = self._page_size
        return pages[key_at // page_size].long() * page_size + key_at % page_size

    def _attend_pages(self, q: Tensor, pages: OpenPages, table: Tensor, layer: int) -> Tensor:
        """Attend the last tokens of the open pages, the tokens of each page together."""
        size, window = self._page_size, self._spec.windows[layer]
        num_before, done, found = len(pages.keys) - len(q), 0, list[Tensor]()
        while done < len(q):
            page = (num_before + done) // size
            end = min(len(q), (page + 1) * size - num_before)
            own = slice(page * size, num_before + end)
            oldest = pages.first_page * size + num_before + done - (window or 2**31) + 1
            before = table[max(oldest, 0) // size : pages.first_page + page]
            keys, values = self._pool.load_pages(layer, before)
            keys = torch.cat((keys.to(self._dtype), pages.keys[own].to(self._dtype)))
            values = torch.cat((values.to(self._dtype), pages.values[own].to(self._dtype)))
            found.append(self._attend_row(q[done:end], keys, values, layer))
            done = end
        return torch.cat(found)

    def _attend_row(self, q: Tensor, keys: Tensor, values: Tensor, layer: int) -> Tensor:
        """Attend the last of `[keys, kv_heads, head_dim]`: `[queries, heads, value_dim]`."""
        key_at = torch.arange(len(keys), device=q.device)
        back = key_at[len(keys) - len(q) :, None] - key_at
        window = self._spec.windows[layer]
        hidden = (back < 0) if window is None else (back < 0) | (back >= window)
        return self._weighted(self._scores(q, keys), hidden, values, layer).to(q.dtype)

    def _attend_in_view(self, row: int, layer: int, q: Tensor, sink_q: Tensor | None) -> Tensor:
        """Attend a row that has a view of its own; returns `[queries, heads, head_dim]`.

        Only the keys that a query of the row reads are loaded.
        """
        batch, page_size = self._batch, self._pool.layout.page_size
        assert batch is not None, "attend before plan"
        assert batch.views is not None, "see attend"
        num_keys = int(batch.seq_lens[row])
        sinks, window = int(batch.views.sinks[row]), int(batch.views.windows[row])
        layer_window = self._spec.windows[layer] or num_keys
        nearest = min(window, layer_window)
        query_at = torch.arange(num_keys - len(q), num_keys, device=q.device)[:, None]
        oldest = max(num_keys - len(q) - nearest + 1, 0)
        key_at = torch.arange(num_keys, device=q.device)
        key_at = key_at[(key_at < sinks) | (key_at >= oldest)]
        slots = batch.block_table[row, key_at // page_size].long() * page_size + key_at % page_size
        keys, values = self._pool.load(layer, slots)
        is_sink = key_at < sinks
        # The position of each query towards the sinks.
        sink_at = query_at.clamp(max=sinks + window - 1)
        back = torch.where(is_sink, sink_at, query_at) - key_at
        limit = torch.where(is_sink, layer_window, nearest)
        scores = self._scores(q, keys)
        if sink_q is not None:
            is_moved = is_sink & (sink_at < query_at)
            scores = torch.where(is_moved, self._scores(sink_q, keys), scores)
        hidden = (back < 0) | (back >= limit)
        return self._weighted(scores, hidden, values, layer).to(q.dtype)

    def _scores(self, q: Tensor, keys: Tensor) -> Tensor:
        """Return `[heads, queries, keys]`."""
        group = self._spec.num_heads // self._spec.num_kv_heads
        wide_keys = keys.to(self._dtype).repeat_interleave(group, dim=1)
        return torch.einsum("qhd,khd->hqk", q.to(self._dtype), wide_keys) * self._spec.scale

    def _weighted(self, scores: Tensor, hidden: Tensor, values: Tensor, layer: int) -> Tensor:
        """Return the sums of values, weighted by the softmax of the scores that are not hidden."""
        spec = self._spec
        group = spec.num_heads // spec.num_kv_heads
        wide_values = values.to(self._dtype).repeat_interleave(group, dim=1)
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        # A weight of zero would keep the NaN of a value that a query does not see.
        is_lost = ~wide_values.isfinite().all(-1)
        wide_values = wide_values.masked_fill(is_lost[..., None], 0.0)
        scores = scores.masked_fill(is_lost.T[:, None], torch.nan)
        scores = scores.masked_fill(hidden, -torch.inf)
        if spec.sinks is not None:
            sink = spec.sinks[layer].to(self._dtype)[:, None, None].expand(-1, scores.shape[1], 1)
            scores = torch.cat((scores, sink), dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : len(values)]
        return torch.einsum("hqk,khd->qhd", weights, wide_values)


def offer(spec: AttentionSpec) -> BackendOffer:
    """Offer it for any model on any device."""
    return BackendOffer(
        "reference",
        1,
        spec.kv_format.default_page_tokens,
        ReferenceAttention,
        formats=tuple(KV_FORMATS.values()),
        reads_mixed_layers=True,
        # Never run elsewhere.
        reads_views=spec.device.type == "cpu",
    )
