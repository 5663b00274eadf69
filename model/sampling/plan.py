"""The parameters of a batch's requests, grouped and laid out on the device for the sampler.

A plan holds from step to step while the batch keeps its slots, so a decode step uploads nothing
but its random numbers. Knows nothing of logits or of positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.interface import SamplingParams
from model.packing import upload
from model.sampling.sampling_ops import ONE, Filters, Penalties

#: A temperature below this acts like zero (vLLM's limit), but divides badly.
MIN_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class SlotRequest:
    """The request in a slot, as far as it does not change from token to token."""

    params: SamplingParams
    #: See `sampling_ops.rng_stream`.
    rng_stream: int
    #: Position of the first token for which `banned` does not hold.
    free_from: int
    banned: tuple[int, ...]
    #: bool `[vocab]`: true where `allowed_token_ids` forbids a token; None where it is not set.
    disallowed: Tensor | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.params.is_greedy or self.params.temperature < MIN_TEMPERATURE

    @property
    def is_penalized(self) -> bool:
        """Whether its earlier tokens matter."""
        params = self.params
        return (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )


@dataclass(frozen=True, slots=True)
class Rows:
    """Numbers of rows, on the host and on the device."""

    rows: list[int]
    index: Tensor

    @property
    def place(self) -> slice | Tensor:
        """Where they are, as an index; neighbours by a slice, which reads without a copy."""
        first, last = self.rows[0], self.rows[-1]
        return slice(first, last + 1) if last - first + 1 == len(self.rows) else self.index


@dataclass(frozen=True, slots=True)
class Draw:
    """Rows that are sampled by the same operations."""

    group: Rows
    filters: Filters
    #: Whether the likeliest tokens must be found (top-k, top-p).
    is_ranked: bool


@dataclass(frozen=True, slots=True)
class Penalized:
    """Rows whose earlier tokens matter."""

    group: Rows
    #: Their rows of `TokenCounts`.
    counts: Rows
    penalties: Penalties


@dataclass(frozen=True, slots=True)
class Restricted:
    """Rows with `allowed_token_ids`."""

    group: Rows
    #: bool `[rows, vocab]`.
    disallowed: Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows of one batch, grouped by the operations that they need."""

    slots: list[int]
    greedy: Rows
    draws: list[Draw]
    #: Flat (rows, token ids, biases), or None.
    bias: tuple[Tensor, Tensor, Tensor] | None
    restricted: Restricted | None
    #: Rows with min_tokens or bad_words, and those of them with bad_words.
    guarded: list[int]
    #: Rows with a grammar.
    constrained: list[int]
    followed: list[int]
    penalized: Penalized | None
    wants_logprobs: Rows

    @property
    def is_only_greedy(self) -> bool:
        """Whether the likeliest token of the unchanged logits is all that is needed."""
        return len(self.greedy.rows) == len(self.slots) and not (
            self.bias is not None
            or self.restricted is not None
            or self.guarded
            or self.constrained
            or self.penalized
            or self.wants_logprobs.rows
        )


@dataclass(frozen=True, slots=True)
class Planner:
    """Lays plans out on one device."""

    vocab_size: int
    device: torch.device

    def plan(self, slots: list[int], held: list[SlotRequest], count_rows: dict[int, int]) -> Plan:
        """Plan for a batch; `held` is parallel to `slots`, `count_rows` by slot."""
        params = [slot.params for slot in held]
        rows = range(len(slots))
        followed = [row for row in rows if params[row].bad_words]
        return Plan(
            slots=slots,
            greedy=self._rows([row for row in rows if held[row].is_greedy]),
            draws=self._draws(held),
            bias=self._bias(held),
            restricted=self._restricted(held),
            guarded=[row for row in rows if params[row].bad_words or params[row].min_tokens > 0],
            followed=followed,
            constrained=[row for row in rows if params[row].grammar is not None],
            penalized=self._penalized(slots, held, count_rows),
            wants_logprobs=self._rows([row for row in rows if params[row].logprobs is not None]),
        )

    def index(self, values: Iterable[int]) -> Tensor:
        """Copy integers to the device."""
        return upload(np.fromiter(values, np.int64), self.device)

    def column(self, values: Iterable[float], dtype: type[np.number] = np.float32) -> Tensor:
        """Copy one number for each row to the device, as `[rows, 1]`."""
        return upload(np.fromiter(values, dtype), self.device).unsqueeze(-1)

    def filters(self, group: list[SamplingParams]) -> Filters:
        """Lay out a group's filters: top-k and min-p each for all its requests or for none."""
        limits = [self._limit(each) for each in group]
        return Filters(
            inverse_temperature=self.column(1.0 / each.temperature for each in group),
            min_weight=(
                self.column((round(each.min_p * ONE) for each in group), np.int64)
                if group[0].min_p > 0.0
                else None
            ),
            top_k=self.column(limits, np.int64) if limits[0] > 0 else None,
            top_p=self.column(
                (each.top_p if each.top_p < 1.0 else np.inf for each in group), np.float64
            ),
        )

    def _limit(self, params: SamplingParams) -> int:
        """Return top_k, or 0 where it keeps the whole vocabulary."""
        return params.top_k if params.top_k < self.vocab_size else 0

    def _rows(self, rows: list[int]) -> Rows:
        return Rows(rows, self.index(rows))

    def _draws(self, held: list[SlotRequest]) -> list[Draw]:
        """Group the rows that are not greedy by the operations that they need."""
        groups: dict[tuple[bool, bool, bool], list[int]] = {}
        for row, slot in enumerate(held):
            if not slot.is_greedy:
                is_limited = self._limit(slot.params) > 0
                is_ranked = is_limited or slot.params.top_p < 1.0
                need = (is_ranked, is_limited, slot.params.min_p > 0.0)
                groups.setdefault(need, []).append(row)
        return [
            Draw(self._rows(rows), self.filters([held[row].params for row in rows]), is_ranked)
            for (is_ranked, _, _), rows in groups.items()
        ]

    def _penalized(
        self, slots: list[int], held: list[SlotRequest], count_rows: dict[int, int]
    ) -> Penalized | None:
        rows = [row for row, slot in enumerate(held) if slot.is_penalized]
        if not rows:
            return None
        group = [held[row].params for row in rows]
        return Penalized(
            self._rows(rows),
            self._rows([count_rows[slots[row]] for row in rows]),
            Penalties(
                repetition=self.column(each.repetition_penalty for each in group),
                presence=self.column(each.presence_penalty for each in group),
                frequency=self.column(each.frequency_penalty for each in group),
            ),
        )

    def _restricted(self, held: list[SlotRequest]) -> Restricted | None:
        rows = [row for row, slot in enumerate(held) if slot.disallowed is not None]
        masks = [slot.disallowed for slot in held if slot.disallowed is not None]
        return Restricted(self._rows(rows), torch.stack(masks)) if rows else None

    def _bias(self, held: list[SlotRequest]) -> tuple[Tensor, Tensor, Tensor] | None:
        entries = [
            (row, token, bias)
            for row, slot in enumerate(held)
            for token, bias in slot.params.logit_bias
        ]
        if not entries:
            return None
        rows, tokens, biases = zip(*entries, strict=True)
        return self.index(rows), self.index(tokens), self.column(biases).squeeze(-1)
