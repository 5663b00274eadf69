"""Prints microseconds a layer of attention takes on this CPU, against torch's dense attention.

Not a test: `python bench/attention.py [--isa avx2] [--layers 30] [--formats bfloat16 int8 int4]`.
With several layers each finds its pages where a real step would: outside the nearest caches.
Formats of the pages take turns, call by call. One thread is measured by its CPU time.
"""

# ruff: noqa: T201 - tables are printed

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))

from model.attention.cpu import CpuAttention
from model.attention.interface import AttentionBatch, AttentionSpec
from model.cpu.library import CpuLibrary, load_cpu_library
from model.cpu.ops import CpuOps
from model.kv.format import KV_FORMATS, KVFormat
from model.kv.pool import KVPool
from model.ops import Ops, TorchOps

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
HIDDEN, INTERMEDIATE = 576, 1536
#: Queries of a row, keys of a row, rows. Decodes are in the middle of a page of any format: in some
#: the last token of a page encodes it.
CASES = (
    (1, 288, 1),
    (1, 4128, 1),
    (1, 288, 8),
    (1, 1056, 8),
    (1, 288, 32),
    (1, 1056, 32),
    (512, 512, 1),
    (512, 4096, 1),
)
CPU = torch.device("cpu")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--formats", nargs="+", choices=KV_FORMATS, default=["float32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    library = load_cpu_library(isa=options.isa)
    if isinstance(library, str):
        sys.exit(library)
    print(f"{library.isa}, {options.threads} threads, {options.layers} layers")
    columns = "".join(f"{name:>10}" for name in options.formats)
    print(f"µs a layer       {columns}   dense SDPA")
    for count, context, rows in CASES:
        times = _format_seconds(library, options.formats, options.layers, (rows, count, context))
        columns = "".join(f"{time_s / options.layers * 1e6:10.0f}" for time_s in times)
        dense_s = _dense_seconds(rows, count, context)
        print(f"{rows:3} x {count:3} of {context:5} {columns} {dense_s * 1e6:12.0f}")
    for ops in (CpuOps(library), TorchOps()):
        _print_ops(ops)


def _format_seconds(
    library: CpuLibrary, formats: list[str], num_layers: int, shape: tuple[int, int, int]
) -> list[float]:
    """Time all layers with pages in each of the formats; shape: rows, queries and keys of each."""
    rows, count, context = shape
    heads = torch.randn(rows * count, HEADS + 2 * KV_HEADS, HEAD_DIM)
    parts = _parts(heads)
    calls: list[Callable[[], object]] = []
    for name in formats:
        spec = _spec(num_layers, KV_FORMATS[name])
        page_size = spec.kv_format.default_page_tokens
        num_pages = rows * -(-context // page_size)
        attention = CpuAttention(spec, _pool(spec, num_pages), library)
        table = torch.randperm(num_pages, dtype=torch.int32).view(rows, -1)
        first = context - count
        if (num_before := first % page_size) and not spec.kv_format.can_share_heads:
            # The tokens before, in the same page, have to be on desks.
            attention.plan(_batch(table, num_before, first, page_size))
            before = torch.randn(rows * num_before, HEADS + 2 * KV_HEADS, HEAD_DIM)
            _all_layers(attention, num_layers, _parts(before))
        attention.plan(_batch(table, count, context, page_size))
        calls.append(partial(_all_layers, attention, num_layers, parts))
    return _shortest(calls)


def _parts(heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return heads[:, :HEADS], heads[:, HEADS:-KV_HEADS], heads[:, -KV_HEADS:]


def _spec(num_layers: int, kv_format: KVFormat) -> AttentionSpec:
    return AttentionSpec(
        num_layers=num_layers,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        scale=HEAD_DIM**-0.5,
        windows=(None,) * num_layers,
        dtype=torch.float32,
        kv_format=kv_format,
        device=CPU,
    )


def _pool(spec: AttentionSpec, num_pages: int) -> KVPool:
    page_size = spec.kv_format.default_page_tokens
    pool = KVPool(spec.layout(page_size), num_pages, CPU)
    both = torch.randn(2, num_pages * page_size, KV_HEADS, HEAD_DIM)
    for layer in range(spec.num_layers):
        if spec.kv_format.can_share_heads:
            pool.store(layer, torch.arange(num_pages * page_size), *both)
        else:
            pool.store_pages(layer, torch.arange(num_pages), *both)
    return pool


def _batch(table: torch.Tensor, count: int, context: int, page_size: int) -> AttentionBatch:
    rows = len(table)
    positions = torch.arange(context - count, context).repeat(rows)
    pages = table.repeat_interleave(count, 0).gather(1, positions[:, None] // page_size)[:, 0]
    return AttentionBatch(
        query_starts=torch.arange(rows + 1, dtype=torch.int32) * count,
        seq_lens=torch.full((rows,), context, dtype=torch.int32),
        block_table=table,
        positions=positions,
        kv_slots=pages.long() * page_size + positions % page_size,
        max_query_len=count,
        max_seq_len=context,
        slots=tuple(range(rows)),
    )


def _all_layers(attention: CpuAttention, num_layers: int, parts: tuple[torch.Tensor, ...]) -> None:
    for layer in range(num_layers):
        attention.attend(layer, *parts)


def _dense_seconds(rows: int, count: int, context: int) -> float:
    """Time torch's attention over dense keys and values with repeated heads."""
    q = torch.randn(rows, HEADS, count, HEAD_DIM)
    k, v = torch.randn(2, rows, HEADS, context, HEAD_DIM)
    mask = torch.ones(count, context, dtype=torch.bool).tril(context - count)
    if count == 1:
        return _seconds(lambda: functional.scaled_dot_product_attention(q, k, v))
    if count == context:
        return _seconds(lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    return _seconds(lambda: functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def _print_ops(ops: Ops) -> None:
    print(f"\n{ops.name}, µs       1 token        8      512")
    norm = torch.randn(HIDDEN)
    angles = torch.randn(4096, HEAD_DIM)
    columns: dict[str, list[float]] = {}
    for tokens in (1, 8, 512):
        x, residual = torch.randn(2, tokens, HIDDEN)
        qkv = torch.randn(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM)
        q, k = qkv[:, :HEADS], qkv[:, HEADS : HEADS + KV_HEADS]
        gate_up = torch.randn(tokens, 2 * INTERMEDIATE)
        positions = torch.arange(tokens)
        calls: dict[str, Callable[[], object]] = {
            "rms_norm": lambda x=x: ops.rms_norm(x, norm, 1e-5, torch.float32),  # type: ignore[misc]
            "add_rms_norm": lambda x=x, r=residual: ops.add_rms_norm(  # type: ignore[misc]
                x, r, norm, 1e-5, torch.float32
            ),
            "apply_rope": lambda q=q, k=k, p=positions: ops.apply_rope(q, k, p, angles),  # type: ignore[misc]
            "silu_and_mul": lambda g=gate_up: ops.silu_and_mul(g),  # type: ignore[misc]
        }
        for name, call in calls.items():
            columns.setdefault(name, []).append(_seconds(call) * 1e6)
    for name, times in columns.items():
        print(f"{name:18}" + "".join(f"{time_us:9.1f}" for time_us in times))


def _seconds(call: Callable[[], object]) -> float:
    return _shortest([call])[0]


def _shortest(calls: list[Callable[[], object]]) -> list[float]:
    """Return the shortest time of many turns of each, since other programs run beside."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in calls]
    started_s, num_turns = time.perf_counter(), 0
    while num_turns < 300 and (num_turns < 6 or time.perf_counter() - started_s < 0.5 * len(calls)):
        num_turns += 1
        for call, mine in zip(calls, times, strict=True):
            started = clock()
            call()
            mine.append(clock() - started)
    return [min(mine) for mine in times]


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
