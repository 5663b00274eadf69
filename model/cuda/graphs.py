"""Records decode steps as graphs and replays them, a graph for each of some numbers of rows.

A replay launches the hundreds of kernels of a step at once, which takes the host a few
microseconds. It uses the memory of the recording, so a step is padded to the next number of rows
and copied there. Knows nothing of CUDA: the recorder is a parameter.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from model.architectures.transformer import Decoder
from model.attention.interface import AttentionBackend, AttentionBatch
from model.packing import DeviceStep, PackedStep

_log = logging.getLogger(__name__)

#: Records a computation; the result repeats it in the same memory.
Record: TypeAlias = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def decode_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Return the numbers of rows with a graph, ascending; the last is `max_num_seqs`.

    Above 64 rows a fifth at most is padding; below, a step mostly reads weights, and further rows
    cost next to nothing.
    """
    buckets = [1, 2, 4, 8]
    while (newest := buckets[-1]) < max_num_seqs:
        buckets.append(newest + max(8, 1 << (newest.bit_length() - 3)))
    return (*(bucket for bucket in buckets if bucket < max_num_seqs), max_num_seqs)


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """The steps to record, and the page that padding writes to."""

    buckets: tuple[int, ...]
    #: Longest sequence, in tokens.
    max_model_len: int
    page_size: int
    #: A page that no sequence has.
    scratch_page: int


class DecodeGraphs:
    """Recorded decode steps: they compute hidden states by replay."""

    def __init__(
        self,
        decoder: Decoder,
        attention: AttentionBackend,
        plan: GraphPlan,
        device: torch.device,
        record: Record,
    ) -> None:
        self._decoder = decoder
        self._attention = attention
        self._plan = plan
        max_rows, max_pages = plan.buckets[-1], -(-plan.max_model_len // plan.page_size)
        #: Token ids, positions and slots in the pool.
        self._numbers = torch.zeros(3, max_rows, dtype=torch.int64, device=device)
        self._query_starts = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._seq_lens = torch.ones(max_rows, dtype=torch.int32, device=device)
        shape = max_rows, max_pages
        self._table = torch.full(shape, plan.scratch_page, dtype=torch.int32, device=device)
        self._numbers[2] = plan.scratch_page * plan.page_size
        began_s = time.perf_counter()
        # The largest first: the others fit into its memory.
        self._replay = {rows: record(self._computation(rows)) for rows in reversed(plan.buckets)}
        taken_s = time.perf_counter() - began_s
        _log.info("%d decode graphs recorded in %.1f s", len(plan.buckets), taken_s)

    def _computation(self, rows: int) -> Callable[[], Tensor]:
        token_ids, positions, kv_slots = self._numbers[:, :rows]
        batch = AttentionBatch(
            query_starts=self._query_starts[: rows + 1],
            seq_lens=self._seq_lens[:rows],
            block_table=self._table[:rows],
            positions=positions,
            kv_slots=kv_slots,
            max_query_len=1,
            max_seq_len=self._plan.max_model_len,
        )

        def compute() -> Tensor:
            # Recorded too: a plan may compute tensors from the batch's.
            self._attention.plan(batch)
            return self._decoder.forward(token_ids, positions, self._attention)

        return compute

    def pad(self, packed: PackedStep) -> PackedStep | None:
        """Return the step as `run` takes it, or None where it was not recorded."""
        buckets = self._plan.buckets
        if not packed.is_decode or packed.num_rows > buckets[-1]:
            return None
        rows = buckets[bisect_left(buckets, packed.num_rows)]
        return packed.padded(rows, self._plan.scratch_page, self._plan.page_size)

    def run(self, step: DeviceStep) -> Tensor:
        """Return float32 `[rows, hidden]`, good until the next run."""
        batch = step.batch
        rows, width = batch.block_table.shape
        for target, source in zip(
            self._numbers, (step.token_ids, batch.positions, batch.kv_slots), strict=True
        ):
            target[:rows].copy_(source)
        self._seq_lens[:rows].copy_(batch.seq_lens)
        self._table[:rows, :width].copy_(batch.block_table)
        return self._replay[rows]()


def record_on_cuda(device: torch.device) -> Record:
    """Return a recorder of CUDA graphs which share one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def record(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        # Compiling and tuning kernels cannot be recorded, so it happens before.
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch's
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                compute()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = compute()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    return record
