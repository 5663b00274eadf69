"""What a batch of requests asks of the sampler, grouped and laid out on the device.

A plan holds from step to step while the batch keeps its slots, so a decode step uploads nothing
but its random numbers. Knows nothing of logits or of positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.interface import SamplingParams
from model.sampling.sampling_ops import ONE, Filters, Penalties

#: Below this a temperature is no different from zero (vLLM's limit), but divides badly.
MIN_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class SlotRequest:
    """What the request in a slot asks for, as far as it does not change from token to token."""

    params: SamplingParams
    #: See `model.draw.stream_of`.
    stream: int
    #: Position of the first token for which `banned` does not hold.
    free_from: int
    banned: tuple[int, ...]
    #: bool `[vocab]`: where `allowed_token_ids` does not allow a token; None where all are.
    disallowed: Tensor | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether chance has no part in it."""
        return self.params.is_greedy or self.params.temperature < MIN_TEMPERATURE

    @property
    def is_penalized(self) -> bool:
        """Whether its earlier tokens matter."""
        params = self.params
        penalties = (
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        return penalties != (1.0, 0.0, 0.0)


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
    """Rows which draw at random, in the same way."""

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
    """Rows which may have some tokens only."""

    group: Rows
    #: bool `[rows, vocab]`.
    disallowed: Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """What one batch of slots needs."""

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
        """Whether the largest logit of each row is all there is to find."""
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
        rows = range(len(slots))
        wants_logprobs = [row for row in rows if held[row].params.logprobs is not None]
        followed = [row for row in rows if held[row].params.bad_words]
        has_least = {row for row in rows if held[row].params.min_tokens > 0}
        return Plan(
            slots=slots,
            greedy=self._rows([row for row in rows if held[row].is_greedy]),
            draws=self._draws(held),
            bias=self._bias(held),
            restricted=self._restricted(held),
            guarded=sorted(has_least.union(followed)),
            followed=followed,
            constrained=[row for row in rows if held[row].params.grammar is not None],
            penalized=self._penalized(slots, held, count_rows),
            wants_logprobs=self._rows(wants_logprobs),
        )

    def upload(self, values: Iterable[float], dtype: torch.dtype) -> Tensor:
        """Bring numbers to the device, without waiting for it."""
        # From pinned memory: a copy from any other makes the host wait for the device.
        pinned = torch.tensor(list(values), dtype=dtype, pin_memory=self.device.type == "cuda")
        return pinned.to(self.device, non_blocking=True)

    def index(self, values: Iterable[int]) -> Tensor:
        """Bring whole numbers to the device."""
        return self.upload(values, torch.int64)

    def column(self, values: Iterable[float], dtype: torch.dtype = torch.float32) -> Tensor:
        """Bring one number for each row to the device, as `[rows, 1]`."""
        return self.upload(values, dtype).unsqueeze(-1)

    def filters(self, group: list[SamplingParams]) -> Filters:
        """Lay out a group's filters; as to top-k and min-p, its requests all have one, or none."""
        limits = [self._limit(each) for each in group]
        return Filters(
            inverse_temperature=self.column(1.0 / each.temperature for each in group),
            min_weight=(
                self.index(round(each.min_p * ONE) for each in group).unsqueeze(-1)
                if group[0].min_p > 0.0
                else None
            ),
            top_k=self.index(limits).unsqueeze(-1) if limits[0] > 0 else None,
            top_p=self.column(
                (each.top_p if each.top_p < 1.0 else torch.inf for each in group), torch.float64
            ),
        )

    def _limit(self, params: SamplingParams) -> int:
        """Return top_k, or 0 where it lets the whole vocabulary through."""
        return params.top_k if params.top_k < self.vocab_size else 0

    def _rows(self, rows: list[int]) -> Rows:
        return Rows(rows, self.index(rows))

    def _draws(self, held: list[SlotRequest]) -> list[Draw]:
        """Group the rows that are not greedy by what has to be done for them."""
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
        masks = {row: slot.disallowed for row, slot in enumerate(held)}
        found = {row: mask for row, mask in masks.items() if mask is not None}
        if not found:
            return None
        return Restricted(self._rows(list(found)), torch.stack(list(found.values())))

    def _bias(self, held: list[SlotRequest]) -> tuple[Tensor, Tensor, Tensor] | None:
        entries = [
            (row, token, bias)
            for row, slot in enumerate(held)
            for token, bias in slot.params.logit_bias
        ]
        if not entries:
            return None
        rows, tokens, biases = zip(*entries, strict=True)
        return self.index(rows), self.index(tokens), self.upload(biases, torch.float32)
