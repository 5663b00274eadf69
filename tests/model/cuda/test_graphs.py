"""Recorded decode steps without a recorder: static places, padding and copied inputs.

`test_equivalence.py` runs whole requests through them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from steps import step_of
from torch import Tensor

from model.attention.interface import AttentionBackend, AttentionBatch
from model.cuda.graphs import DecodeGraphs, GraphPlan, decode_buckets
from model.interface import (
    PENDING_TOKEN,
    RowSpan,
    SampleSpan,
    SamplingParams,
    SlotStart,
    StepInput,
)
from model.packing import Packer

CPU = torch.device("cpu")
PAGE_SIZE, SCRATCH = 4, 9
PARAMS = SamplingParams(max_tokens=1)


def decode(token_ids: list[int], starts: list[int], pages: list[list[int]]) -> StepInput:
    spans, slots = [RowSpan(start, start, 1) for start in starts], list(range(len(token_ids)))
    return step_of(token_ids, spans, slots, pages, [SampleSpan(row, 0, 1) for row in slots])


@dataclass
class Seen:
    """A decoder and an attention backend which keep their inputs."""

    name: str = "seen"
    batches: list[AttentionBatch] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)

    def plan(self, batch: AttentionBatch) -> None:
        self.batches.append(batch)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        assert attention is self
        self.tokens.append(token_ids)
        return torch.stack([token_ids, positions], dim=1).float()

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 64, 100, 256, 1000])
def test_buckets_end_with_the_most_rows_and_pad_little(most: int) -> None:
    buckets = decode_buckets(most)
    assert buckets[0] == 1
    assert buckets[-1] == most
    assert list(buckets) == sorted(set(buckets))
    for rows in range(65, most + 1):
        bucket = next(bucket for bucket in buckets if bucket >= rows)
        assert bucket - rows <= bucket / 5 + 1
    assert len(decode_buckets(256)) < 20


def graphs_of(
    seen: Seen, record: Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
) -> DecodeGraphs:
    return DecodeGraphs(seen, seen, GraphPlan((1, 2, 4), 16, PAGE_SIZE, SCRATCH), CPU, record)


def test_the_largest_is_recorded_first() -> None:
    seen, sizes = Seen(), []

    def record(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        sizes.append(len(compute()))
        return compute

    graphs_of(seen, record)
    assert sizes == [4, 2, 1]


def test_a_step_is_padded_with_rows_that_touch_the_scratch_page_alone() -> None:
    seen = Seen()
    graphs = graphs_of(seen, lambda compute: compute)
    step = decode([5, 6, 7], [4, 0, 9], [[3, 1], [2], [0, 5, 7]])
    padded = graphs.pad(Packer(8, 16, PAGE_SIZE).pack(step))
    assert padded is not None
    hidden = graphs.run(padded.on(CPU))
    assert hidden[:3].tolist() == [[5, 4], [6, 0], [7, 9]]
    batch = seen.batches[-1]
    assert batch.seq_lens.tolist() == [5, 1, 10, 1]
    assert batch.kv_slots.tolist() == [4, 8, 29, SCRATCH * PAGE_SIZE]
    assert batch.query_starts.tolist() == [0, 1, 2, 3, 4]
    assert batch.block_table[3, 0] == SCRATCH
    assert batch.block_table[2, :3].tolist() == [0, 5, 7]
    # The graph was recorded for any length there may be.
    assert (batch.max_query_len, batch.max_seq_len) == (1, 16)


def test_every_replay_reads_the_same_memory() -> None:
    seen = Seen()
    graphs = graphs_of(seen, lambda compute: compute)
    packer = Packer(8, 16, PAGE_SIZE)
    for token_id in (5, 6):
        padded = graphs.pad(packer.pack(decode([token_id], [0], [[3]])))
        assert padded is not None
        assert graphs.run(padded.on(CPU))[0, 0] == token_id
    first, second = seen.tokens[-2:]
    assert first.data_ptr() == second.data_ptr()
    assert seen.batches[-2].block_table.data_ptr() == seen.batches[-1].block_table.data_ptr()


def test_what_was_not_recorded_is_left_to_others() -> None:
    graphs = graphs_of(Seen(), lambda compute: compute)
    prompt = step_of([1, 2], [RowSpan(0, 0, 2)], [0], [[1]], [SampleSpan(0, 1, 1)])
    assert graphs.pad(Packer(8, 16, PAGE_SIZE).pack(prompt)) is None
    many = decode([1] * 5, [0] * 5, [[page] for page in range(5)])
    assert graphs.pad(Packer(8, 16, PAGE_SIZE).pack(many)) is None


def test_pending_tokens_are_looked_up_in_the_step_before() -> None:
    packer = Packer(8, 16, PAGE_SIZE)
    slots, pages = [4, 2, 6], [[0], [1], [2]]
    started = [SlotStart(slot, PARAMS, [1]) for slot in slots]
    rows = [RowSpan(0, 0, 1), RowSpan(0, 0, 1), RowSpan(0, 0, 2)]
    samples = [SampleSpan(0, 0, 1), SampleSpan(2, 1, 1)]
    packer.pack(step_of([7, 8, 9, 9], rows, slots, pages, samples, [], started))
    step = replace(
        decode([8, PENDING_TOKEN, PENDING_TOKEN], [1, 2, 1], [[1], [2], [0]]), slots=[2, 6, 4]
    )
    packed = packer.pack(step)
    assert packed.pending.tolist() == [1, 2]
    assert packed.pending_from.tolist() == [1, 0]
    assert packed.token_ids.tolist() == [8, 0, 0]


def test_both_arrays_come_apart_on_the_device_as_they_were_put_together() -> None:
    packer = Packer(8, 16, PAGE_SIZE)
    step = step_of(
        [7, 8, 9, 5],
        [RowSpan(4, 4, 1), RowSpan(0, 0, 3)],
        [1, 0],
        [[3, 1], [2]],
        [SampleSpan(0, 0, 1), SampleSpan(1, 2, 1)],
    )
    packed = packer.pack(step)
    there = packed.on(CPU)
    assert there.token_ids.tolist() == [7, 8, 9, 5]
    assert there.sampled.tolist() == [0, 3]
    batch = there.batch
    assert batch.positions.tolist() == [4, 0, 1, 2]
    assert batch.kv_slots.tolist() == [4, 8, 9, 10]
    assert batch.seq_lens.tolist() == [5, 3]
    assert batch.query_starts.tolist() == [0, 1, 4]
    assert np.array_equal(batch.block_table.numpy(), packed.block_table)
    assert there.pending.tolist() == there.pending_from.tolist() == []
