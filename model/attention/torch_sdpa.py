"""Attention by gathering pages and calling torch's own: the fallback, on any device.

Decodes share one batched call; each prefill chunk has its own. Several times slower than a backend
that reads the pages in place, and far faster than `model/attention/reference.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from model.attention.interface import AttentionBatch, AttentionSpec, BackendOffer
from model.kv.format import CODED_FORMATS, FLOAT_FORMATS
from model.kv.pool import KVPool


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that are attended in one call: all have as many queries."""

    #: `[rows * queries]`: the tokens of the flat batch.
    tokens: Tensor
    #: `[rows * keys]`: the slots of their keys; outside a row's view, of the nearest key in it.
    slots: Tensor
    #: `[rows, queries, keys]`: how many tokens back a key lies; negative past the query.
    back: Tensor
    #: Of a row with a view of its own.
    view: _RowView | None = None


@dataclass(frozen=True, slots=True)
class _RowView:
    """The view of the only row in a group, whose first keys are its sinks."""

    num_sinks: int
    window: int
    #: `[queries, 1]`: which queries meet the sinks with a rotation of their own.
    is_moved: Tensor

    def seen(self, back: Tensor, layer_window: int | None) -> Tensor:
        """Return which keys the queries read in a layer."""
        seen = back >= 0
        seen[..., self.num_sinks :] &= back[..., self.num_sinks :] < self.window
        return seen if layer_window is None else seen & (back < layer_window)


class TorchAttention:
    """See `AttentionBackend`."""

    name = "torch"

    def __init__(self, spec: AttentionSpec, pool: KVPool) -> None:
        self._spec = spec
        self._pool = pool
        self._kv_slots: Tensor | None = None
        self._groups: list[_Group] = []

    def plan(self, batch: AttentionBatch) -> None:
        """See `AttentionBackend`."""
        self._kv_slots = batch.kv_slots
        starts = batch.query_starts.tolist()
        counts = [end - start for start, end in pairwise(starts)]
        bounded = bounded_rows(batch)
        decodes = [row for row, count in enumerate(counts) if count == 1 and row not in bounded]
        rows_of_groups = [
            [row] for row, count in enumerate(counts) if count > 1 and row not in bounded
        ]
        if decodes:
            rows_of_groups.append(decodes)
        self._groups = [self._group(batch, rows, counts[rows[0]]) for rows in rows_of_groups]
        self._groups += [self._bounded_group(batch, row, counts[row]) for row in bounded]

    def _group(self, batch: AttentionBatch, rows: list[int], num_queries: int) -> _Group:
        device, page_size = batch.seq_lens.device, self._pool.layout.page_size
        index = torch.tensor(rows, device=device)
        seq_lens = batch.seq_lens[index].long()
        key_at = torch.arange(int(seq_lens.max()), device=device)
        # Not outside the view: the values there may be NaN, which a weight of zero keeps.
        real_at = torch.minimum(key_at, seq_lens[:, None] - 1)
        if (window := self._spec.widest_window) is not None:
            real_at = torch.maximum(real_at, batch.first_keys(window)[index, None])
        pages = batch.block_table[index].long().gather(1, real_at // page_size)
        query = torch.arange(num_queries, device=device)
        query_at = seq_lens[:, None] - num_queries + query
        return _Group(
            tokens=(batch.query_starts[index].long()[:, None] + query).flatten(),
            slots=(pages * page_size + real_at % page_size).flatten(),
            back=query_at[:, :, None] - key_at,
        )

    def _bounded_group(self, batch: AttentionBatch, row: int, num_queries: int) -> _Group:
        """Return the group of one row with a view of its own, without the keys that it hides."""
        assert batch.views is not None, "see bounded_rows"
        page_size, num_keys = self._pool.layout.page_size, int(batch.seq_lens[row])
        first = int(batch.query_starts[row])
        sinks, window = int(batch.views.sinks[row]), int(batch.views.windows[row])
        query_at = torch.arange(num_keys - num_queries, num_keys)[:, None]
        key_at = torch.arange(num_keys)
        # The sinks are there in any layer; behind the widest window keys may be NaN.
        nearest = min(window, self._spec.widest_window or window)
        key_at = key_at[(key_at < sinks) | (key_at > num_keys - num_queries - nearest)]
        sink_at = query_at.clamp(max=sinks + window - 1)
        at = torch.where(key_at < sinks, sink_at, query_at)
        pages = batch.block_table[row, key_at // page_size].long()
        return _Group(
            tokens=torch.arange(first, first + num_queries),
            slots=pages * page_size + key_at % page_size,
            back=(at - key_at)[None],
            view=_RowView(sinks, window, sink_at < query_at),
        )

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sink_q: Tensor | None = None
    ) -> Tensor:
        """See `AttentionBackend`."""
        assert self._kv_slots is not None, "attend before plan"
        self._pool.store(layer, self._kv_slots, k, v)
        shape = len(q), self._spec.num_heads, self._spec.value_dim
        out = torch.empty(shape, dtype=q.dtype, device=q.device)
        for group in self._groups:
            out.index_copy_(0, group.tokens, self._attend_group(group, layer, q, sink_q))
        return out.flatten(1)

    def _num_kv_heads(self, num_queries: int) -> int:
        """Return among how many KV heads the query heads of a row are divided.

        Those of a latent chunk read keys by strides: their mask would be as large as the scores.
        """
        is_chunk_of_latents = self._spec.latent_dim is not None and num_queries > 1
        return self._spec.num_heads if is_chunk_of_latents else self._spec.num_kv_heads

    def _packed(self, group: _Group, q: Tensor) -> Tensor:
        """Return `[rows, kv_heads, heads_each * queries, head_dim]`.

        The query heads of a KV head become further queries of it, so that no key is repeated.
        """
        spec = self._spec
        rows, num_queries, _ = group.back.shape
        kv_heads = self._num_kv_heads(num_queries)
        heads_each = spec.num_heads // kv_heads
        return (
            q.index_select(0, group.tokens)
            .view(rows, num_queries, kv_heads, heads_each, spec.head_dim)
            .permute(0, 2, 3, 1, 4)
            .reshape(rows, kv_heads, heads_each * num_queries, spec.head_dim)
        )

    def _attend_group(self, group: _Group, layer: int, q: Tensor, sink_q: Tensor | None) -> Tensor:
        """Return `[rows * queries, heads, head_dim]`."""
        spec = self._spec
        rows, num_queries, num_keys = group.back.shape
        kv_heads = self._num_kv_heads(num_queries)
        heads_each = spec.num_heads // kv_heads
        packed = self._packed(group, q)
        window = spec.windows[layer]
        if group.view is not None:
            seen = group.view.seen(group.back, window)
        else:
            seen = group.back >= 0
            if window is not None:
                seen &= group.back < window
        # `[rows, kv_heads, keys, head_dim]`. Whole keys are the values of a latent layout: torch
        # has no fused function of narrower ones. The rest of the result is left out.
        planes = [
            loaded.to(q.dtype).view(rows, num_keys, *loaded.shape[1:]).transpose(1, 2)
            for loaded in self._pool.load(layer, group.slots)[: 1 if spec.latent_dim else 2]
        ]
        keys, values = (one.expand(-1, kv_heads, -1, -1) for one in (planes[0], planes[-1]))
        mask = seen.repeat(1, heads_each, 1).unsqueeze(1)
        moved = None
        if group.view is not None and group.view.num_sinks:
            assert sink_q is not None, "queries towards sinks are missing"
            moved = self._packed(group, sink_q)
        # A single query sees its newest key, and torch adds masks to scores, which keeps NaN.
        is_finite = num_queries == 1 or all(bool(one.isfinite().all()) for one in planes)
        if spec.beyond_softmax or moved is not None or not is_finite:
            scores = self._scores(packed, keys)
            if moved is not None and group.view is not None:
                sinks = slice(group.view.num_sinks)
                is_moved = group.view.is_moved.repeat(heads_each, 1)
                to_sinks = self._scores(moved, keys[:, :, sinks])
                scores[..., sinks] = torch.where(is_moved, to_sinks, scores[..., sinks])
            if not is_finite:
                values = _contain(scores, values)
            attended = self._spelled_out(layer, scores, values, mask).to(q.dtype)
        else:
            attended = functional.scaled_dot_product_attention(
                packed, keys, values, attn_mask=mask, scale=spec.scale
            )
        return (
            attended.view(rows, kv_heads, heads_each, num_queries, spec.head_dim)
            .permute(0, 3, 1, 2, 4)[..., : spec.value_dim]
            .reshape(rows * num_queries, spec.num_heads, spec.value_dim)
        )

    def _scores(self, q: Tensor, keys: Tensor) -> Tensor:
        """Return `[rows, kv_heads, heads_each * queries, keys]`, in float32."""
        return (q.float() @ keys.float().mT).mul_(self._spec.scale)

    def _spelled_out(self, layer: int, scores: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        """Attend with caps, sinks and queries that depend on the key.

        torch's own function has none of them, so all scores are in memory, in float32.
        """
        spec = self._spec
        if spec.softcap is not None:
            scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
        scores.masked_fill_(~seen, -torch.inf)
        if spec.sinks is not None:
            heads_each = spec.num_heads // spec.num_kv_heads
            sinks = spec.sinks[layer].view(spec.num_kv_heads, heads_each)
            sinks = sinks.repeat_interleave(scores.shape[2] // heads_each, dim=1)
            sinks = sinks[None, :, :, None].expand(len(scores), -1, -1, 1)
            scores = torch.cat((scores, sinks), dim=-1)
        weights = scores.softmax(-1)[..., : values.shape[2]]
        return weights @ values.float()


def _contain(scores: Tensor, values: Tensor) -> Tensor:
    """Return finite values, and mark the scores of others, which a mask hides from queries.

    A weight of zero would keep a NaN.
    """
    is_lost = ~values.isfinite().all(-1)
    scores.masked_fill_(is_lost.unsqueeze(2), torch.nan)
    return values.masked_fill(is_lost.unsqueeze(3), 0.0)


def bounded_rows(batch: AttentionBatch) -> list[int]:
    """Return the rows whose views hide keys."""
    if batch.views is None:
        return []
    ends = enumerate(batch.seq_lens.tolist())
    return [row for row, end in ends if batch.views.max_keys(row) < end]


def offer(spec: AttentionSpec) -> BackendOffer:
    """Offer it for any model on any device."""
    return BackendOffer(
        "torch",
        1,
        16,
        TorchAttention,
        formats=(*FLOAT_FORMATS, *CODED_FORMATS),
        reads_mixed_layers=True,
        # Never run elsewhere.
        reads_views=spec.device.type == "cpu",
    )
