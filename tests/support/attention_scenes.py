"""Rows in pages, the step that comes next, and dense attention in float64 over the same keys."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache.view import FULL_VIEW, View
from model.attention.interface import AttentionBatch, AttentionSpec
from model.kv.format import KVFormat, LayerPages, float_format
from model.kv.pool import KVPool
from model.packing import packed_views

CPU = torch.device("cpu")


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend the last tokens of `[keys, kv_heads, head_dim]`, in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    scores = q.double().transpose(0, 1) @ k.transpose(1, 2) * scale
    back = torch.arange(k.shape[1] - len(q), k.shape[1])[:, None] - torch.arange(k.shape[1])
    hidden = (back < 0) | (back >= (window or 2**31))
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(hidden, -torch.inf).exp()
    # A sink is one more term of the sum that weights are divided by.
    total = weights.sum(-1, keepdim=True)
    total += 0.0 if sinks is None else sinks.double().exp()[:, None, None]
    return (weights / total @ v).transpose(0, 1)


def planes_of(pages: LayerPages) -> list[Tensor]:
    """Return a layer's planes: keys, values, then the scales of both where there are codes."""
    return [pages.keys, pages.values, *pages.scales]


def poison(pages: LayerPages, slots: Tensor | None = None) -> None:
    """Fill slots, by default all, with NaN: the floats of a layer, or the scales of its codes."""
    for plane in planes_of(pages):
        if plane.dtype.is_floating_point and plane.dtype.itemsize > 1:
            flat = plane.flatten(0, 1)
            flat[slice(None) if slots is None else slots] = torch.nan


def with_views(batch: AttentionBatch, views: tuple[View, ...]) -> AttentionBatch:
    """Return a batch whose rows have these views."""
    rows = np.repeat(np.arange(len(views)), batch.query_starts.diff().cpu().numpy())
    own = {row: view for row, view in enumerate(views) if view != FULL_VIEW}
    packed = packed_views(own, rows, batch.positions.cpu().numpy(), batch.seq_lens.cpu().numpy())
    return replace(batch, views=packed.on(batch.positions.device) if packed else None)


@dataclass
class Scene:
    """A pool with the past of some rows in it, and the step that comes next."""

    spec: AttentionSpec
    pool: KVPool
    batch: AttentionBatch
    qkv: Tensor
    #: Of each row all keys and values, `[keys, kv_heads, head_dim]`, as the pool rounds them.
    history: list[tuple[Tensor, Tensor]]

    def on(self, device: torch.device) -> Scene:
        """Return the same on another device; the expected result stays on its own."""
        spec = replace(self.spec, device=device)
        pool = KVPool(self.pool.layout, self.pool.num_pages, device)
        for layer in range(spec.num_layers):
            pages = planes_of(pool.pages(layer)), planes_of(self.pool.pages(layer))
            for to, plane in zip(*pages, strict=True):
                to.copy_(plane)
        moved: Any = {
            field.name: value.to(device)
            for field in fields(self.batch)
            if isinstance(value := getattr(self.batch, field.name), Tensor)
        }
        return Scene(spec, pool, replace(self.batch, **moved), self.qkv.to(device), self.history)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        spec = self.spec
        last = spec.num_heads + spec.num_kv_heads
        return self.qkv[:, : spec.num_heads], self.qkv[:, spec.num_heads : last], self.qkv[:, last:]

    def expected(self, layer: int) -> Tensor:
        starts = self.batch.query_starts.tolist()
        q = self.parts[0].cpu()
        spec = self.spec
        sinks = None if spec.sinks is None else spec.sinks[layer]
        rows = [
            dense(
                q[starts[i] : starts[i + 1]],
                k,
                v,
                spec.scale,
                spec.windows[layer],
                spec.softcap,
                sinks,
            )
            for i, (k, v) in enumerate(self.history)
        ]
        return torch.cat(rows).flatten(1)


def make_scene(
    rows: tuple[tuple[int, int], ...],
    *,
    head_dim: int = 64,
    num_kv_heads: int = 3,
    group: int = 3,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype = torch.float32,
    kv_format: KVFormat | None = None,
    windows: tuple[int | None, ...] = (None,),
    seed: int = 0,
) -> Scene:
    """Return a scene; rows are (tokens of this step, tokens in all).

    Pages are in `kv_format`, by default floats of `kv_dtype`.
    """
    generator = torch.Generator().manual_seed(seed)
    spec = AttentionSpec(
        num_layers=len(windows),
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        windows=windows,
        dtype=dtype,
        kv_format=kv_format or float_format(kv_dtype),
        device=CPU,
    )
    needs = [-(-end // page_size) for _, end in rows]
    pool = KVPool(spec.layout(page_size), sum(needs) + 2, CPU)
    shuffled = torch.randperm(pool.num_pages, generator=generator).int()
    # Behind a row's pages is one that no row owns, full of NaN as all of the pool.
    table = torch.full((len(rows), max(needs) + 2), int(shuffled[-1]), dtype=torch.int32)
    num_tokens = sum(count for count, _ in rows)
    qkv = torch.randn((num_tokens, num_kv_heads * (group + 2), head_dim), generator=generator).to(
        dtype
    )
    _, new_k, new_v = Scene(spec, pool, None, qkv, []).parts  # type: ignore[arg-type] # not yet
    for layer in range(len(windows)):
        poison(pool.pages(layer))
    positions, slots, history, done = [], [], [], 0
    for row, (count, end) in enumerate(rows):
        table[row, : needs[row]] = shuffled[: needs[row]]
        shuffled = shuffled[needs[row] :]
        at = torch.arange(end)
        slot = table[row, at // page_size].long() * page_size + at % page_size
        both = torch.randn(2, end, num_kv_heads, head_dim, generator=generator)
        for layer in range(len(windows)):
            pool.store(layer, slot[:-count], *both[:, :-count])
        both[0, -count:] = new_k[done : done + count]
        both[1, -count:] = new_v[done : done + count]
        both = spec.kv_format.decode(*spec.kv_format.encode(both))
        done += count
        positions.append(at[-count:])
        slots.append(slot[-count:])
        history.append((both[0], both[1]))
    counts = torch.tensor([0, *(count for count, _ in rows)])
    batch = AttentionBatch(
        query_starts=counts.cumsum(0).int(),
        seq_lens=torch.tensor([end for _, end in rows]).int(),
        block_table=table,
        positions=torch.cat(positions),
        kv_slots=torch.cat(slots),
        max_query_len=max(count for count, _ in rows),
        max_seq_len=max(end for _, end in rows),
    )
    return Scene(spec, pool, batch, qkv, history)
