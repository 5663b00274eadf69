"""Steps as arrays: rows side by side, with their places in pages and the kernels' parameters.

Numpy alone: knows nothing of devices. Everything a step brings to a GPU is two arrays, so that it
takes two copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache.view import FULL_VIEW, View
from model.attention.interface import AttentionBatch, RowViews
from model.interface import PENDING_TOKEN, StepInput

#: In `RowViews.windows`.
NO_WINDOW = 2**31 - 1


class BlockTables:
    """Every slot's block table as one array, so that a step copies only its new entries."""

    def __init__(self, max_num_seqs: int, max_pages: int) -> None:
        self._pages = np.zeros((max_num_seqs, max_pages), dtype=np.int32)
        self._num_pages = [0] * max_num_seqs

    def forget(self, slot: int) -> None:
        """Let the slot begin anew: another sequence has it now."""
        self._num_pages[slot] = 0

    def take(self, slot: int) -> np.ndarray:
        """Return a slot's block table, and let it begin anew."""
        pages = self._pages[slot, : self._num_pages[slot]].copy()
        self.forget(slot)
        return pages

    def gather(self, slots: list[int], page_ids: list[list[int]], width: int) -> np.ndarray:
        """Return `[rows, width]` page ids; past a row's end stand ids of earlier sequences."""
        for slot, pages in zip(slots, page_ids, strict=True):
            known = self._num_pages[slot]
            if known != len(pages):
                if len(pages) > self._pages.shape[1]:
                    self._widen(len(pages))
                self._pages[slot, known : len(pages)] = pages[known:]
                self._num_pages[slot] = len(pages)
        table: np.ndarray = self._pages[np.asarray(slots), :width]
        return table

    def _widen(self, num_pages: int) -> None:
        """Make room for a sequence longer than `max_model_len`, which a bounded view allows."""
        missing = max(num_pages, 2 * self._pages.shape[1]) - self._pages.shape[1]
        self._pages = np.pad(self._pages, ((0, 0), (0, missing)))


@dataclass(frozen=True, slots=True)
class DrawnRows:
    """The rows of a step's logits: a token is drawn from each, and those of a span are neighbours.

    Parallel lists.
    """

    slots: list[int]
    #: Of the drawn token in the text.
    positions: list[int]
    #: The draft's tokens before the drawn one, on which its row depends; empty in all where the
    #: step has no drafts.
    drafts: list[list[int]]


def drawn_rows(step: StepInput) -> DrawnRows:
    """Return the rows of a step's logits."""
    if not any(span.count > 1 for span in step.spans.values()):
        return DrawnRows([step.slots[row] for row in step.sample_rows], step.sample_positions, [])
    rows = DrawnRows([], [], [])
    starts = np.cumsum([0, *step.counts]).tolist()
    for span, position in zip(step.samples, step.sample_positions, strict=True):
        first = starts[span.row] + span.first + 1
        rows.slots.extend([step.slots[span.row]] * span.count)
        rows.positions.extend(range(position, position + span.count))
        rows.drafts.extend(step.token_ids[first : first + i] for i in range(span.count))
    return rows


@dataclass(frozen=True, slots=True)
class PackedViews:
    """See `RowViews`."""

    sinks: np.ndarray
    windows: np.ndarray
    sink_positions: np.ndarray

    def padded(self, num_tokens: int, num_rows: int) -> PackedViews:
        """Add rows and tokens without views."""
        rows = (0, num_rows - len(self.sinks))
        tokens = (0, num_tokens - len(self.sink_positions))
        return PackedViews(
            np.pad(self.sinks, rows),
            np.pad(self.windows, rows, constant_values=NO_WINDOW),
            np.pad(self.sink_positions, tokens, constant_values=-1),
        )

    def on(self, device: torch.device) -> RowViews:
        """Bring them to the device, without waiting for it."""
        sinks, windows = _together((self.sinks, self.windows), device)
        (sink_positions,) = _together((self.sink_positions,), device)
        return RowViews(sinks, windows, sink_positions, has_sinks=bool(self.sinks.any()))


def packed_views(
    views: dict[int, View], rows: np.ndarray, positions: np.ndarray, ends: np.ndarray
) -> PackedViews | None:
    """Return the views of a step's rows, or None where they hide no key in it.

    `views`: by row. `rows` and `positions` are those of the tokens, `ends` the lengths of rows.
    """
    sinks = np.zeros(len(ends), np.int32)
    windows = np.full(len(ends), NO_WINDOW, np.int32)
    for row, view in views.items():
        if view.window is not None and view.sinks + view.window < ends[row]:
            sinks[row], windows[row] = view.sinks, view.window
    if (windows == NO_WINDOW).all():
        return None
    last = (sinks.astype(np.int64) + windows - 1)[rows]
    is_moved = (sinks[rows] > 0) & (positions > last)
    return PackedViews(sinks, windows, np.where(is_moved, last, -1))


class PackedTable(NamedTuple):
    """The places of a step in one group of pages."""

    #: int64 `[tokens]`.
    kv_slots: np.ndarray
    #: int32 `[rows, pages of the longest]`.
    block_table: np.ndarray

    @classmethod
    def of(
        cls, table: np.ndarray, rows: np.ndarray, positions: np.ndarray, page_size: int
    ) -> PackedTable:
        """Find the places of tokens; `rows` and `positions`, by stored keys, are theirs."""
        kv_slots = table[rows, positions // page_size].astype(np.int64) * page_size
        kv_slots += positions % page_size
        return cls(kv_slots, table)

    def padded(
        self, num_tokens: int, num_rows: int, scratch_page: int, page_size: int
    ) -> PackedTable:
        """Add so many tokens and rows, which write to `scratch_page` and read it alone."""
        slots = np.full(num_tokens, scratch_page * page_size, np.int64)
        table = np.pad(self.block_table, ((0, num_rows), (0, 0)), constant_values=scratch_page)
        return PackedTable(np.concatenate([self.kv_slots, slots]), table)


@dataclass(frozen=True, slots=True)
class PackedStep:
    """A step on the host."""

    #: int64 `[tokens]` each.
    token_ids: np.ndarray
    positions: np.ndarray
    #: int32 `[rows + 1]`, `[rows]`.
    query_starts: np.ndarray
    seq_lens: np.ndarray
    #: One, or two: that of the windowed layers is the second.
    tables: list[PackedTable]
    #: int64: after which tokens one is drawn.
    sampled: np.ndarray
    #: int64: which tokens are not known yet, and which of the step in flight before sampled them.
    pending: np.ndarray
    pending_from: np.ndarray
    max_query_len: int
    max_seq_len: int
    #: Of each row, without padding.
    slots: list[int]
    #: Of rows whose own views hide keys; None where there are none.
    views: PackedViews | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens, padding included."""
        return len(self.token_ids)

    @property
    def num_rows(self) -> int:
        """Rows, padding included."""
        return len(self.seq_lens)

    @property
    def is_decode(self) -> bool:
        """Whether each row has one token."""
        return self.max_query_len == 1

    def padded(
        self, num_tokens: int, num_rows: int, scratch_pages: Sequence[int], page_size: int
    ) -> PackedStep:
        """Add rows of one token, while there are tokens, then rows of none, then tokens of no row.

        All of them write to the scratch page of each group and read it alone.
        """
        missing, missing_rows = num_tokens - self.num_tokens, num_rows - self.num_rows
        assert missing >= 0, f"{self.num_tokens} tokens for a place of {num_tokens}"
        assert missing_rows >= 0, f"{self.num_rows} rows for a place of {num_rows}"
        zeros = np.zeros(missing, np.int64)
        starts = self.num_tokens + np.arange(1, missing_rows + 1, dtype=np.int32)
        return replace(
            self,
            token_ids=np.concatenate([self.token_ids, zeros]),
            positions=np.concatenate([self.positions, zeros]),
            query_starts=np.concatenate([self.query_starts, np.minimum(starts, num_tokens)]),
            seq_lens=np.concatenate([self.seq_lens, np.ones(missing_rows, np.int32)]),
            tables=[
                table.padded(missing, missing_rows, scratch_page, page_size)
                for table, scratch_page in zip(self.tables, scratch_pages, strict=True)
            ],
            views=None if self.views is None else self.views.padded(num_tokens, num_rows),
        )

    def on(self, device: torch.device) -> DeviceStep:
        """Bring it to the device, without waiting for it."""
        token_ids, positions, sampled, pending, pending_from, *kv_slots = _together(
            (
                self.token_ids,
                self.positions,
                self.sampled,
                self.pending,
                self.pending_from,
                *(table.kv_slots for table in self.tables),
            ),
            device,
        )
        starts, lens, *tables = _together(
            (
                self.query_starts,
                self.seq_lens,
                *(table.block_table.ravel() for table in self.tables),
            ),
            device,
        )
        shape = self.tables[0].block_table.shape
        batch = AttentionBatch(
            query_starts=starts,
            seq_lens=lens,
            block_table=tables[0].view(shape),
            positions=positions,
            kv_slots=kv_slots[0],
            max_query_len=self.max_query_len,
            max_seq_len=self.max_seq_len,
            views=None if self.views is None else self.views.on(device),
            slots=tuple(self.slots),
        )
        if len(tables) > 1:
            windowed = replace(batch, block_table=tables[1].view(shape), kv_slots=kv_slots[1])
            batch = replace(batch, windowed=windowed)
        return DeviceStep(token_ids, batch, sampled, pending, pending_from)


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """A step on the device; see `PackedStep`."""

    token_ids: Tensor
    batch: AttentionBatch
    sampled: Tensor
    pending: Tensor
    pending_from: Tensor


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device; to a GPU from pinned memory, without which the host would wait."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _together(arrays: tuple[np.ndarray, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Bring arrays of one dtype to the device: to a GPU in one copy."""
    if device.type != "cuda":
        return tuple(map(torch.from_numpy, arrays))
    ends = np.cumsum([len(array) for array in arrays])[:-1].tolist()
    return upload(np.concatenate(arrays), device).tensor_split(ends)


class Packer:
    """Turns steps into arrays. Stores block tables, and the samples of the step before."""

    def __init__(
        self, max_num_seqs: int, max_model_len: int, page_size: int, num_groups: int = 1
    ) -> None:
        self._page_size = page_size
        #: One, or two with that of the windowed layers.
        self._tables = [
            BlockTables(max_num_seqs, -(-max_model_len // page_size)) for _ in range(num_groups)
        ]
        #: By slot, views of requests; there are none of other slots.
        self._views: dict[int, View] = {}
        #: By slot, which of the last step's samples is its newest token.
        self._sample_of_slot: dict[int, int] = {}

    def forget(self, slot: int) -> None:
        """Let the slot begin anew: another sequence has it now."""
        for tables in self._tables:
            tables.forget(slot)
        self._views.pop(slot, None)

    def take_table(self, slot: int) -> np.ndarray:
        """Return a slot's block table; the next step brings it another one."""
        return self._tables[0].take(slot)

    def pack(self, step: StepInput) -> PackedStep:
        """Lay out the next step."""
        for start in step.started:
            self.forget(start.slot)
            if start.view != FULL_VIEW:
                self._views[start.slot] = start.view
        page_size, slots = self._page_size, step.slots
        firsts = np.fromiter(step.positions, np.int64, len(step.positions))
        counts = np.fromiter(step.counts, np.int64, len(step.counts))
        # Of stored keys.
        ends = firsts + counts
        for row, num_dropped in step.dropped.items():
            ends[row] -= num_dropped
        query_starts = np.zeros(len(counts) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_starts[1:])
        rows = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(query_starts[-1]) - query_starts[rows] + firsts[rows]
        max_seq_len = int(ends.max())
        width = -(-max_seq_len // page_size)
        # Windowed layers drop no keys by their scores.
        stored_at = positions + (ends - counts - firsts)[rows] if step.dropped else positions
        tables = [
            PackedTable.of(known.gather(slots, page_ids, width), rows, stored_at, page_size)
            for known, page_ids in zip(
                self._tables, (step.page_ids, step.windowed_page_ids), strict=False
            )
        ]
        token_ids = np.fromiter(step.token_ids, np.int64, len(step.token_ids))
        pending = pending_from = np.flatnonzero(token_ids == PENDING_TOKEN)
        if len(pending):
            token_ids[pending] = 0
            pending_rows = rows[pending].tolist()
            pending_from = np.asarray([self._sample_of_slot[slots[row]] for row in pending_rows])
        sampled = self._pack_samples(step, query_starts)
        views: dict[int, View] = {}
        if self._views:
            own = self._views
            views = {row: own[slot] for row, slot in enumerate(slots) if slot in own}
        return PackedStep(
            token_ids=token_ids,
            positions=positions,
            query_starts=query_starts,
            seq_lens=ends.astype(np.int32),
            tables=tables,
            sampled=sampled,
            pending=pending,
            pending_from=pending_from,
            max_query_len=int(counts.max()),
            max_seq_len=max_seq_len,
            views=packed_views(views, rows, positions, ends) if views else None,
            slots=slots,
        )

    def _pack_samples(self, step: StepInput, query_starts: np.ndarray) -> np.ndarray:
        """Return after which tokens one is drawn, and note which of them are the newest."""
        slots = step.slots
        sample_rows = np.fromiter(step.sample_rows, np.int64, len(step.sample_rows))
        firsts = query_starts[sample_rows + 1].astype(np.int64) - 1
        for index, span in step.spans.items():
            firsts[index] = query_starts[span.row] + span.first
        if not any(span.count > 1 for span in step.spans.values()):
            self._sample_of_slot = {slots[row]: index for index, row in enumerate(step.sample_rows)}
            return firsts
        spans = step.samples
        # Which token behind a draft is the newest is not known yet, so no step continues it now.
        ends = np.cumsum([span.count for span in spans])
        self._sample_of_slot = {
            slots[span.row]: end - 1
            for span, end in zip(spans, ends.tolist(), strict=True)
            if span.count == 1
        }
        return np.concatenate([firsts[i] + np.arange(span.count) for i, span in enumerate(spans)])
