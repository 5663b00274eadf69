"""Sequences that keep the keys of the highest scores: the queries that score, and the choice.

See `cache.selection.Selection` for when keys are dropped. Knows nothing of requests, nor of which
pages are free. The scores are those of MorphKV (arXiv:2503.00979), or of H2O (arXiv:2306.14048).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cache.selection import Fusion, Selection
from model.attention.interface import AttentionSpec, QueryCopy
from model.interface import StepInput
from model.kv.pool import KVPool
from model.weight_sums import KEYS, WeightSums


class _Slot:
    """The newest queries of a sequence, or the sums of the weights by all of them."""

    def __init__(self, selection: Selection, spec: AttentionSpec) -> None:
        self.selection = selection
        self.num_dropped = 0
        #: By layer; empty where the queries of the window score.
        self.sums: list[WeightSums] = []
        #: The queries at positions below this are in the sums.
        self.num_summed = 0
        if selection.scoring == "all":
            self.sums = [WeightSums(spec.num_kv_heads, spec.scale) for _ in range(spec.num_layers)]
            return
        #: `[layers, window, kv_heads, head_dim]`, summed over the heads of a KV head: the sum of
        #: their products with a key is the product of their sum. That at position p is at p modulo
        #: the window.
        self.queries = torch.empty(
            spec.num_layers, selection.window, spec.num_kv_heads, spec.head_dim
        )


class KeySelections:
    """The slots whose sequences drop keys by their scores."""

    def __init__(self, spec: AttentionSpec, pool: KVPool) -> None:
        self._spec = spec
        self._pool = pool
        self._slots: dict[int, _Slot] = {}

    def __bool__(self) -> bool:
        """Whether there is a slot that has to be noted."""
        return bool(self._slots)

    def start(self, slot: int, selection: Selection | None) -> None:
        """Let another sequence begin in a slot; None: it drops no keys by their scores."""
        self._slots.pop(slot, None)
        if selection is not None:
            self._slots[slot] = _Slot(selection, self._spec)

    def has_to_drop(self, slot: int, num_dropped: int) -> bool:
        """Return whether a row without so many keys has keys to drop before its step.

        Raises `ValueError` for a sequence that cannot choose them.
        """
        if slot not in self._slots:
            raise ValueError("a row has dropped keys, but its sequence has no selection")
        return num_dropped > self._slots[slot].num_dropped

    def drop(self, slot: int, pages: Tensor, new_pages: Tensor, num_dropped: int) -> None:
        """Keep the best and the newest keys of a slot, at the front of its new pages.

        `pages`: int64, with all its keys so far; `num_dropped`: keys gone afterwards, in all.
        """
        one = self._slots[slot]
        num_kept = one.selection.capacity
        num_stored = num_kept + num_dropped - one.num_dropped
        slots, new_slots = self._kv_slots(pages), self._kv_slots(new_pages)
        for layer in range(self._spec.num_layers):
            kept = self._best(layer, one, slots[:num_stored])
            if one.sums:
                one.sums[layer].keep(kept)
            self._pool.keep(layer, slots[:num_stored], kept, new_slots[:num_kept])
        one.num_dropped = num_dropped

    def _kv_slots(self, pages: Tensor) -> Tensor:
        page_size = self._pool.layout.page_size
        return (pages[:, None] * page_size + torch.arange(page_size)).flatten()

    def _keys(self, layer: int, kv_slots: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
        """Return float32 `[keys, kv_heads, head_dim]`, of some of the slots."""
        return self._pool.load(layer, kv_slots[begin:end])[0].float()

    def _best(self, layer: int, slot: _Slot, kv_slots: Tensor) -> Tensor:
        """Return `[capacity, kv_heads]`: which of the stored keys are kept, oldest first."""
        selection, num_older = slot.selection, len(kv_slots) - slot.selection.window
        if slot.sums:
            return kept_keys(slot.sums[layer].sums[:, :num_older], selection)
        queries = slot.queries[layer].transpose(0, 1)
        scores = torch.cat(
            [
                queries @ self._keys(layer, part).permute(1, 2, 0)
                for part in torch.split(kv_slots[:num_older], KEYS)
            ],
            dim=-1,
        ).mul_(self._spec.scale)
        return kept_keys(fused(scores, selection.fusion), selection)

    def copy_of(self, step: StepInput) -> QueryCopy | None:
        """Return a place for the queries of a step that have to be noted; None: there are none."""
        rows = [row for row, slot in enumerate(step.slots) if slot in self._slots]
        if not rows:
            return None
        ends = torch.tensor(step.counts).cumsum(0).tolist()
        tokens = [torch.arange(ends[row] - self._num_newest(step, row), ends[row]) for row in rows]
        return QueryCopy(self._spec, torch.cat(tokens), ends[-1])

    def note(self, step: StepInput, copy: QueryCopy) -> None:
        """Note the queries of a step, as of `copy_of`."""
        kv_heads, first = self._spec.num_kv_heads, 0
        for row, slot in enumerate(step.slots):
            if slot not in self._slots:
                continue
            count, end = self._num_newest(step, row), step.positions[row] + step.counts[row]
            one, newest = self._slots[slot], copy.queries[:, first : first + count]
            first += count
            if one.sums:
                self._sum_weights(step, row, one, newest)
                continue
            places = torch.arange(end - count, end) % one.selection.window
            grouped = newest.view(*newest.shape[:2], kv_heads, -1, newest.shape[-1])
            one.queries[:, places] = grouped.sum(3)

    def _sum_weights(self, step: StepInput, row: int, slot: _Slot, queries: Tensor) -> None:
        """Add the weights by a row's queries; one that is computed again was added before."""
        position, count = step.positions[row], step.counts[row]
        num_before = max(0, slot.num_summed - position)
        if num_before >= count:
            return
        slot.num_summed = position + count
        kv_slots = self._kv_slots(torch.tensor(step.page_ids[row]))
        first = position + num_before - step.dropped.get(row, 0)
        for layer, sums in enumerate(slot.sums):
            sums.add(queries[layer, num_before:], first, partial(self._keys, layer, kv_slots))

    def _num_newest(self, step: StepInput, row: int) -> int:
        slot = self._slots[step.slots[row]]
        return step.counts[row] if slot.sums else min(step.counts[row], slot.selection.window)


def why_not(spec: AttentionSpec) -> str:
    """Return why sequences of a model cannot keep keys by their scores; empty where they can."""
    if spec.device.type != "cpu":
        return f"on {spec.device.type} no keys are chosen by their scores"
    if any(spec.windows):
        return "layers of the model have windows"
    return spec.beyond_two_planes or spec.beyond_softmax


def fused(scores: Tensor, fusion: Fusion) -> Tensor:
    """Return `[kv_heads, keys]`: each query's softmax over the keys, fused over the queries."""
    weights = scores.softmax(-1)
    return weights.sum(1) if fusion == "sum" else weights.amax(1)


def kept_keys(scores: Tensor, selection: Selection) -> Tensor:
    """Return int64 `[capacity, kv_heads]`: ascending indices of the best keys and the newest.

    `scores`: `[kv_heads, keys]` of all but the newest. Of equal ones the older is better.
    """
    kv_heads, num_older = scores.shape
    order = scores.argsort(dim=-1, descending=True, stable=True)
    best = order[:, : selection.capacity - selection.window].sort(-1).values
    newest = torch.arange(num_older, num_older + selection.window).expand(kv_heads, -1)
    return torch.cat((best, newest), dim=-1).T
