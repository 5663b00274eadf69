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
from model.cuda.graphs import (
    DecodeGraphs,
    GraphPlan,
    GraphSize,
    decode_sizes,
    draft_sizes,
    recorded_sizes,
)
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

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sink_q: Tensor | None = None
    ) -> Tensor:
        raise NotImplementedError

    def forward(self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        assert attention is self
        self.tokens.append(token_ids)
        return torch.stack([token_ids, positions], dim=1).float()

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 64, 100, 256, 1000])
def test_sizes_of_decodes_end_with_the_most_rows_and_pad_little(most: int) -> None:
    sizes = decode_sizes(most)
    rows = [size.rows for size in sizes]
    assert [size.tokens for size in sizes] == rows
    assert rows[0] == 1
    assert rows[-1] == most
    assert rows == sorted(set(rows))
    for number in range(65, most + 1):
        place = next(place for place in rows if place >= number)
        assert place - number <= place / 5 + 1
    assert len(decode_sizes(256)) < 20


@pytest.mark.parametrize("most", [1, 2, 3, 8, 100, 256])
def test_sizes_with_drafts_have_room_for_every_step_of_few_tokens_and_are_few(most: int) -> None:
    sizes = draft_sizes(most)
    largest = max(size.tokens for size in sizes)
    assert largest <= max(most, 64)
    assert len(draft_sizes(256)) <= 21
    for rows in range(1, largest // 8 + 1):
        for tokens in range(rows + 1, min(8 * rows, largest) + 1):
            best = min(size for size in sizes if size.rows >= rows and size.tokens >= tokens)
            assert best.tokens < max(2 * tokens, 4 * rows)


def test_sizes_are_recorded_by_memory_and_with_drafts_only_on_request() -> None:
    assert recorded_sizes(4, has_drafts=False) == decode_sizes(4)
    sizes = recorded_sizes(4, has_drafts=True)
    assert set(sizes) == {*decode_sizes(4), *draft_sizes(4)}
    assert sizes[-3:] == ((16, 4), (16, 2), (32, 4))
    assert [size for size in sizes if size.tokens == 4] == [(4, 4), (4, 2), (4, 1)]


def graphs_of(
    seen: Seen, record: Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
) -> DecodeGraphs:
    sizes = ((1, 1), (4, 1), (2, 2), (4, 4), (8, 4))
    plan = GraphPlan(tuple(GraphSize(*size) for size in sizes), 16, PAGE_SIZE, (SCRATCH,))
    return DecodeGraphs(seen, seen, plan, CPU, record)


def test_the_largest_is_recorded_first() -> None:
    seen, sizes = Seen(), []

    def record(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        sizes.append(len(compute()))
        return compute

    graphs_of(seen, record)
    assert sizes == [8, 4, 2, 4, 1]


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


def drafts(
    counts: list[int], starts: list[int], pages: list[list[int]], first_token: int = 10
) -> StepInput:
    spans = [RowSpan(start, start, count) for start, count in zip(starts, counts, strict=True)]
    samples = [SampleSpan(row, 0, count) for row, count in enumerate(counts)]
    tokens = list(range(first_token, first_token + sum(counts)))
    return step_of(tokens, spans, list(range(len(counts))), pages, samples)


def test_a_step_with_drafts_is_padded_with_rows_of_one_token_of_none_and_tokens_of_no_row() -> None:
    seen = Seen()
    graphs = graphs_of(seen, lambda compute: compute)
    packer = Packer(8, 16, PAGE_SIZE)
    padded = graphs.pad(packer.pack(drafts([3, 1], [4, 9], [[3, 1], [0, 5, 7]])))
    assert padded is not None
    step = padded.on(CPU)
    hidden = graphs.run(step)
    assert hidden[:4].tolist() == [[10, 4], [11, 5], [12, 6], [13, 9]]
    assert step.sampled.tolist() == [0, 1, 2, 3]
    batch = seen.batches[-1]
    assert batch.query_starts.tolist() == [0, 3, 4, 5, 6]
    assert batch.seq_lens.tolist() == [7, 10, 1, 1]
    # Two tokens are of no row.
    assert batch.kv_slots.tolist() == [4, 5, 6, 29] + [SCRATCH * PAGE_SIZE] * 4
    assert (batch.max_query_len, batch.max_seq_len) == (8, 16)
    # No token is left for the last row.
    padded = graphs.pad(packer.pack(drafts([3, 2, 2], [4, 9, 0], [[3, 1], [0, 5, 7], [2]])))
    assert padded is not None
    graphs.run(padded.on(CPU))
    assert seen.batches[-1].query_starts.tolist() == [0, 3, 5, 7, 8]
    padded = graphs.pad(packer.pack(drafts([3, 3, 2], [4, 9, 0], [[3, 1], [0, 5, 7], [2]])))
    assert padded is not None
    graphs.run(padded.on(CPU))
    assert seen.batches[-1].query_starts.tolist() == [0, 3, 6, 8, 8]


def test_decodes_after_drafts_have_rows_of_one_token_again() -> None:
    seen = Seen()
    graphs = graphs_of(seen, lambda compute: compute)
    packer = Packer(8, 16, PAGE_SIZE)
    for step, starts in (
        (drafts([3], [4], [[3, 1]]), [0, 3]),
        (decode([5], [4], [[3, 1]]), [0, 1]),
        (drafts([2], [4], [[3, 1]]), [0, 2]),
    ):
        padded = graphs.pad(packer.pack(step))
        assert padded is not None
        graphs.run(padded.on(CPU))
        assert seen.batches[-1].query_starts.tolist() == starts
        # The fewest rows that the step fits.
        assert len(seen.batches[-1].seq_lens) == 1


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
    prompt = drafts([9], [0], [[1, 2, 3]])
    assert graphs.pad(Packer(8, 16, PAGE_SIZE).pack(prompt)) is None
    # More tokens than any graph has, and more rows.
    long = drafts([8, 2], [0, 0], [[1, 2], [3]])
    assert graphs.pad(Packer(8, 16, PAGE_SIZE).pack(long)) is None
    wide = drafts([2, 1, 1, 1, 1], [0] * 5, [[page] for page in range(5)])
    assert graphs.pad(Packer(8, 16, PAGE_SIZE).pack(wide)) is None
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
    assert np.array_equal(batch.block_table.numpy(), packed.tables[0].block_table)
    assert there.pending.tolist() == there.pending_from.tolist() == []
