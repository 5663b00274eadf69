"""Records decodes, with drafts or without, as graphs and replays them: one for each of some sizes.

A replay launches the hundreds of kernels of a step at once, which takes the host a few
microseconds. It uses the memory of the recording, so a step is padded to the next size and copied
there. Knows nothing of CUDA: the recorder is a parameter.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from model.architectures.transformer import Decoder, ViewedDecoder
from model.attention.interface import FEW_QUERIES, AttentionBackend, AttentionBatch, RowViews
from model.interface import MAX_BOUNDED_LEN
from model.packing import NO_WINDOW, DeviceStep, PackedStep

_log = logging.getLogger(__name__)

#: Records a computation; the result repeats it in the same memory.
Record: TypeAlias = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]

#: Tokens of a row, on average, in the recorded steps with drafts.
_DRAFT_TOKENS = (2, 4, 8)
#: Tokens of the largest of these: as many as the largest decode has, or so many if that is more.
#: They bound the memory and the time of recording; a larger step takes longer than its launches.
_MOST_DRAFT_TOKENS = 64


class GraphSize(NamedTuple):
    """The size of a recorded step: each row has one token, or the rows have drafts."""

    tokens: int
    rows: int

    @property
    def has_drafts(self) -> bool:
        """Whether rows have several tokens."""
        return self.tokens > self.rows


def recorded_sizes(max_num_seqs: int, *, has_drafts: bool) -> tuple[GraphSize, ...]:
    """Return the sizes to record, ascending by the memory that their graphs take."""
    sizes = [*decode_sizes(max_num_seqs), *(draft_sizes(max_num_seqs) if has_drafts else ())]
    # Of as many tokens, the fewer rows have the more splits of their keys.
    return tuple(sorted(sizes, key=lambda size: (size.tokens, -size.rows)))


def decode_sizes(max_num_seqs: int) -> tuple[GraphSize, ...]:
    """Return the sizes of recorded decodes without drafts, ascending, up to `max_num_seqs` rows.

    Above 64 rows a fifth at most is padding; below, a step mostly reads weights, and further rows
    cost next to nothing.
    """
    numbers = [1, 2, 4, 8]
    while (newest := numbers[-1]) < max_num_seqs:
        numbers.append(newest + max(8, 1 << (newest.bit_length() - 3)))
    fitting = (*(rows for rows in numbers if rows < max_num_seqs), max_num_seqs)
    return tuple(GraphSize(rows, rows) for rows in fitting)


def draft_sizes(max_num_seqs: int) -> tuple[GraphSize, ...]:
    """Return the sizes of recorded steps with drafts: powers of two of rows, and of tokens each."""
    rows = [1 << bits for bits in range((max_num_seqs - 1).bit_length() + 1)]
    most = max(max_num_seqs, _MOST_DRAFT_TOKENS)
    sizes = (GraphSize(each * number, number) for each, number in product(_DRAFT_TOKENS, rows))
    return tuple(size for size in sizes if size.tokens <= most)


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """The steps to record, and the page that padding writes to."""

    #: Ascending: the last is recorded first.
    sizes: tuple[GraphSize, ...]
    #: Longest sequence, in tokens.
    max_model_len: int
    page_size: int
    #: Of each group, a page that no sequence has: one, or two with that of the windowed layers.
    scratch_pages: tuple[int, ...]


class _RecordedViews:
    """The views of a recorded step's rows, in the memory that replays read."""

    def __init__(self, max_rows: int, max_tokens: int, device: torch.device) -> None:
        self._sinks = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._windows = torch.full_like(self._sinks, NO_WINDOW)
        self._sink_positions = torch.full((max_tokens,), -1, dtype=torch.int64, device=device)
        self._are_plain = True

    def of(self, size: GraphSize) -> RowViews:
        """Return those of a size."""
        rows = self._sinks[: size.rows], self._windows[: size.rows]
        return RowViews(*rows, self._sink_positions[: size.tokens], has_sinks=True)

    def copy(self, views: RowViews | None) -> None:
        """Copy the views of a step; None: all rows have the model's own."""
        if views is not None:
            self._sinks[: len(views.sinks)].copy_(views.sinks)
            self._windows[: len(views.windows)].copy_(views.windows)
            self._sink_positions[: len(views.sink_positions)].copy_(views.sink_positions)
        elif not self._are_plain:
            self._sinks.zero_()
            self._windows.fill_(NO_WINDOW)
            self._sink_positions.fill_(-1)
        self._are_plain = views is None


class DecodeGraphs:
    """Recorded decodes: they compute hidden states by replay.

    A step is padded to the smallest size that has its tokens and its rows, none of which has more
    than `FEW_QUERIES` tokens. The tokens of each row are an input of the graph, and the host's
    numbers are the largest: any attention backend serves that reads no tensor on the host. Views
    of rows are inputs, too, where a decoder for them is given: else `pad` refuses such steps.
    """

    def __init__(
        self,
        decoder: Decoder,
        attention: AttentionBackend,
        plan: GraphPlan,
        device: torch.device,
        record: Record,
        viewed: ViewedDecoder | None = None,
    ) -> None:
        """Record all steps. `viewed`: the decoder, where requests may have views of their own."""
        self._decoder = decoder
        self._viewed = viewed
        self._attention = attention
        self._plan = plan
        max_rows = max(size.rows for size in plan.sizes)
        max_tokens = max(size.tokens for size in plan.sizes)
        #: Token ids, positions and slots in each pool.
        num_groups = len(plan.scratch_pages)
        self._numbers = torch.zeros(2 + num_groups, max_tokens, dtype=torch.int64, device=device)
        self._decode_starts = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._draft_starts = self._decode_starts.clone()
        self._seq_lens = torch.ones(max_rows, dtype=torch.int32, device=device)
        # Under a bounded view a text may be longer than the model's context.
        longest = MAX_BOUNDED_LEN if viewed else plan.max_model_len
        shape = max_rows, -(-longest // plan.page_size)
        self._tables = [
            torch.full(shape, page, dtype=torch.int32, device=device) for page in plan.scratch_pages
        ]
        for slots, page in zip(self._numbers[2:], plan.scratch_pages, strict=True):
            slots.fill_(page * plan.page_size)
        self._views = _RecordedViews(max_rows, max_tokens, device)
        began_s = time.perf_counter()
        # The largest first: the others fit into its memory.
        self._replay = {size: record(self._computation(size)) for size in reversed(plan.sizes)}
        taken_s = time.perf_counter() - began_s
        _log.info("%d graphs recorded in %.1f s", len(self._replay), taken_s)

    def _computation(self, size: GraphSize) -> Callable[[], Tensor]:
        token_ids, positions, *kv_slots = self._numbers[:, : size.tokens]
        starts = self._draft_starts if size.has_drafts else self._decode_starts
        batch = AttentionBatch(
            query_starts=starts[: size.rows + 1],
            seq_lens=self._seq_lens[: size.rows],
            block_table=self._tables[0][: size.rows],
            positions=positions,
            kv_slots=kv_slots[0],
            max_query_len=FEW_QUERIES if size.has_drafts else 1,
            max_seq_len=self._plan.max_model_len,
            views=None if self._viewed is None else self._views.of(size),
        )
        if len(kv_slots) > 1:
            table = self._tables[1][: size.rows]
            batch = replace(batch, windowed=replace(batch, block_table=table, kv_slots=kv_slots[1]))

        def compute() -> Tensor:
            # Recorded too: a plan may compute tensors from the batch's.
            self._attention.plan(batch)
            if self._viewed is None:
                return self._decoder.forward(token_ids, positions, self._attention)
            return self._viewed.forward(token_ids, positions, self._attention, batch.views)

        return compute

    def pad(self, packed: PackedStep) -> PackedStep | None:
        """Return the step as `run` takes it, or None where it was not recorded."""
        if packed.max_query_len > FEW_QUERIES:
            return None
        if packed.views is not None and self._viewed is None:
            return None
        has_drafts = not packed.is_decode
        fitting = [
            size
            for size in self._replay
            if size.has_drafts == has_drafts
            and size.tokens >= packed.num_tokens
            and size.rows >= packed.num_rows
        ]
        if not fitting:
            return None
        return packed.padded(*min(fitting), self._plan.scratch_pages, self._plan.page_size)

    def run(self, step: DeviceStep) -> Tensor:
        """Return float32 `[tokens, hidden]`, good until the next run."""
        batch = step.batch
        (tokens,), (rows, width) = step.token_ids.shape, batch.block_table.shape
        batches = [batch] if batch.windowed is None else [batch, batch.windowed]
        sources = step.token_ids, batch.positions, *(one.kv_slots for one in batches)
        for target, source in zip(self._numbers, sources, strict=True):
            target[:tokens].copy_(source)
        self._views.copy(batch.views)
        self._seq_lens[:rows].copy_(batch.seq_lens)
        for table, one in zip(self._tables, batches, strict=True):
            table[:rows, :width].copy_(one.block_table)
        size = GraphSize(tokens, rows)
        if size.has_drafts:
            self._draft_starts[: rows + 1].copy_(batch.query_starts)
        return self._replay[size]()


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
