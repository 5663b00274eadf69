"""Steps over pages with a past, for any backend and device, and their expected results."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from cases import Case
from torch import Tensor

from cache.view import FULL_VIEW, View
from model.attention.interface import AttentionBackend, AttentionBatch, AttentionSpec
from model.attention.reference import ReferenceAttention
from model.attention.registry import choose_backend
from model.kv.format import KVFormat, float_format
from model.kv.pool import KVPool
from model.packing import packed_views

CPU = torch.device("cpu")
BF16 = torch.bfloat16
#: Relative to the largest value, for bfloat16 operands.
TOLERANCE = 2e-2


class Scene:
    """A pool with a past, and a step over it, on two devices."""

    def __init__(
        self,
        rows: tuple[tuple[int, int], ...],
        head_dim: int,
        page_size: int,
        window: int | None = None,
        kv_format: KVFormat | None = None,
        view: View = FULL_VIEW,
    ) -> None:
        """`kv_format`: of the pages; None: the floats of queries. `view`: of all rows."""
        generator = torch.Generator().manual_seed(0)
        self.heads, self.kv_heads, self.head_dim = 8, 2, head_dim
        self.window, self.page_size, self.kv_format, self.view = window, page_size, kv_format, view
        needs = [-(-end // page_size) for _, end in rows]
        pages = torch.randperm(sum(needs) + 1, generator=generator).int()
        table = torch.full((len(rows), max(needs)), int(pages[-1]), dtype=torch.int32)
        slots, done = [], 0
        for row, (count, end) in enumerate(rows):
            table[row, : needs[row]] = pages[done : done + needs[row]]
            done += needs[row]
            at = torch.arange(end - count, end)
            slots.append(table[row, at // page_size].long() * page_size + at % page_size)
        self.past = torch.randn(
            2, len(pages), page_size, self.kv_heads, head_dim, generator=generator
        ).to(BF16)
        self.kv_slots = torch.cat(slots)
        self.qkv = torch.randn(len(self.kv_slots), 12, head_dim, generator=generator).to(BF16)
        starts = torch.tensor([0, *(count for count, _ in rows)]).cumsum(0).int()
        lens = torch.tensor([end for _, end in rows]).int()
        longest = max(count for count, _ in rows), max(end for _, end in rows)
        positions = torch.cat([torch.arange(end - count, end) for count, end in rows])
        self.parts = starts, lens, table, positions, longest

    @cached_property
    def wanted(self) -> tuple[Tensor, list[Tensor]]:
        """Return the expected result, in float64 on the CPU, and the bytes of the pages."""
        spec, pool, batch = self.on(CPU, torch.float64)
        backend = ReferenceAttention(spec, pool, torch.float64)
        backend.plan(batch)
        q, k, v = self.split(CPU, torch.float64)
        attended = backend.attend(0, q, k, v, q.flip(0) if batch.has_sinks else None)
        return attended, stored_bytes(pool)

    def found(
        self, name: str, case: Case, *, is_recorded: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the result of a backend, as float64 on the CPU, and the bytes of the pages."""
        spec, pool, batch = self.on(case.device, BF16)
        backend: AttentionBackend = choose_backend(name, spec).build(spec, pool)
        q, k, v = self.split(case.device, BF16)
        sink_q = q.flip(0) if batch.has_sinks else None

        def compute() -> Tensor:
            backend.plan(batch)
            return backend.attend(0, q, k, v, sink_q)

        if is_recorded:
            replay = case.record()(compute)
            replay().zero_()
            return replay().cpu().double(), stored_bytes(pool)
        return compute().cpu().double(), stored_bytes(pool)

    def split(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return the step's queries, keys and values."""
        q, k, v = self.qkv.to(device, dtype).split((8, 2, 2), dim=1)  # type: ignore[no-untyped-call] # torch's
        return q, k, v

    def on(
        self, device: torch.device, dtype: torch.dtype
    ) -> tuple[AttentionSpec, KVPool, AttentionBatch]:
        """Return the model, the pages with the past, and the step, on a device."""
        scale, windows = self.head_dim**-0.5, (self.window,)
        heads = self.heads, self.kv_heads, self.head_dim
        stored = self.kv_format or float_format(dtype)
        spec = AttentionSpec(1, *heads, scale, windows, dtype, stored, device)
        pool = KVPool(spec.layout(self.page_size), self.past.shape[1], device)
        slots = torch.arange(pool.num_pages * self.page_size, device=device)
        pool.store(0, slots, *self.past.flatten(1, 2).to(device))
        starts, lens, table, positions, longest = self.parts
        batch = AttentionBatch(
            query_starts=starts.to(device),
            seq_lens=lens.to(device),
            block_table=table.to(device),
            positions=positions.to(device),
            kv_slots=self.kv_slots.to(device),
            max_query_len=longest[0],
            max_seq_len=longest[1],
        )
        if self.view != FULL_VIEW:
            views = dict.fromkeys(range(len(lens)), self.view)
            rows = torch.arange(len(lens)).repeat_interleave(starts.diff())
            packed = packed_views(views, rows.numpy(), positions.numpy(), lens.numpy())
            batch = replace(batch, views=packed.on(device) if packed else None)
        return spec, pool, batch


def stored_bytes(pool: KVPool) -> list[Tensor]:
    """Return the bytes of codes and scales, on the CPU."""
    keys, values, scales = pool.pages(0)
    return [plane.cpu().view(torch.uint8) for plane in (keys, values, *scales)]


def close(found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> str:
    """Describe the error relative to the largest value; raise if it is too large."""
    error = float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())
    # Written so that NaN fails.
    if not error < tolerance:
        raise AssertionError(f"off by {error:.2g}")
    return f"off by {error:.2g}"
