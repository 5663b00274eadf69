"""The one door to attention: paged keys and values, any mix of prefill chunks and decodes.

A backend owns neither the pages (`model/kv/pool.py`) nor their meaning (`cache/`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.kv.pool import KVPool


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What stays the same from layer to layer and step to step."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    #: Factor on q·k, usually head_dim ** -0.5.
    scale: float
    #: For each layer how many tokens back a query sees, itself included; None: all of them.
    windows: tuple[int | None, ...]
    #: Dtype of q, k, v and of the result; the pool's dtype may differ.
    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device
    #: Scores s become softcap * tanh(s / softcap); None: they stay.
    softcap: float | None = None
    #: For each layer float32 `[heads]`: the score of one more key, which every query sees and
    #: whose value is zero.
    sinks: tuple[Tensor, ...] | None = None

    @property
    def beyond_softmax(self) -> str:
        """Say what a kernel of plain softmax cannot do for this model; nothing where it can."""
        if self.softcap is not None:
            return "the model caps its attention scores"
        return "" if self.sinks is None else "the model has attention sinks"


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The rows of one step. Row i's queries are its last `query_lens[i]` of `seq_lens[i]` tokens.

    Tensors lie on the model's device; int32 but for `positions` and `kv_slots` (int64).
    """

    #: `[rows + 1]`: row i's tokens are `query_starts[i]:query_starts[i + 1]` of the flat batch.
    query_starts: Tensor
    #: `[rows]`: keys each row ends with, the step's own included.
    seq_lens: Tensor
    #: `[rows, max_pages]`: page ids; entries past a row's need are any valid page.
    block_table: Tensor
    #: `[tokens]`: each token's position in its sequence.
    positions: Tensor
    #: `[tokens]`: page * page_size + offset, where each token's key and value go.
    kv_slots: Tensor
    max_query_len: int
    max_seq_len: int


class AttentionBackend(Protocol):
    """Causal grouped-query attention over the pool's pages."""

    #: As on the command line.
    name: str

    def plan(self, batch: AttentionBatch) -> None:
        """Take in the rows of the next step; every `attend` until the next `plan` is over these."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k and v to their pages, then attend.

        q is `[tokens, heads, head_dim]`, k and v `[tokens, kv_heads, head_dim]` (rotated already;
        any strides with a contiguous last dimension). Returns `[tokens, heads * head_dim]`.
        """


class PagedAttention(AttentionBackend, Protocol):
    """A backend whose `attend` has a second half of its own: reading what somebody else wrote."""

    @property
    def kv_slots(self) -> Tensor:
        """Where the planned step's keys and values go, as in `AttentionBatch`."""

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of a layer, as in `KVPool`."""

    def read(self, layer: int, q: Tensor) -> Tensor:
        """Attend, the step's own keys and values being in their pages; as `attend` otherwise."""


@dataclass(frozen=True, slots=True)
class BackendOffer:
    """A backend that can serve a model on this machine, before there is a pool to serve it from."""

    name: str
    #: The pool's page size must be a multiple of it.
    page_multiple: int
    default_page_size: int
    build: Callable[[AttentionSpec, KVPool], AttentionBackend]
    #: Decisions an operator should know, one line each.
    notes: tuple[str, ...] = ()

    def page_size(self, requested: int | None) -> int:
        """Return the page size in tokens; ValueError naming it where the request does not fit."""
        if requested is None:
            return self.default_page_size
        if requested % self.page_multiple:
            raise ValueError(
                f"page_size must be a multiple of {self.page_multiple} "
                f"for attention backend {self.name}, got {requested}"
            )
        return requested
