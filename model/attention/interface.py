"""The interface of attention over pages, for any mix of prefill chunks and decodes.

A backend owns neither the pages (`model/kv/pool.py`) nor their meaning (`cache/`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from cache.view import FULL_VIEW, View
from configs.speculation import MAX_DRAFT_TOKENS
from model.kv.format import FLOAT_FORMATS, KVFormat, KVLayout, LayerPages
from model.kv.pool import KVPool

#: Queries of a row that is computed like a decode, at most: its newest token and a draft behind it.
FEW_QUERIES = 8


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The constants of a model's attention."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    #: Factor on q·k, usually head_dim ** -0.5.
    scale: float
    #: For each layer how many tokens back a query sees, itself included; None: all of them.
    windows: tuple[int | None, ...]
    #: Dtype of q, k, v and of the result.
    dtype: torch.dtype
    #: Of the pages.
    kv_format: KVFormat
    device: torch.device
    #: Scores s become softcap * tanh(s / softcap); None: they stay.
    softcap: float | None = None
    #: For each layer float32 `[heads]`: the score of one more key, which every query sees and
    #: whose value is zero.
    sinks: tuple[Tensor, ...] | None = None
    #: Elements of a value, which are the first of its key (`KVLayout.latent_dim`); None: values are
    #: vectors of their own, as wide as the keys.
    latent_dim: int | None = None
    #: Of the layers whose pages are in another format.
    other_formats: Mapping[int, KVFormat] = field(default_factory=dict)
    #: Tokens of a row that may be rejected and computed again, at most.
    max_draft_tokens: int = MAX_DRAFT_TOKENS

    def layout(self, page_size: int) -> KVLayout:
        """Return the layout of the model's pages."""
        return KVLayout(
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            page_size,
            self.kv_format,
            self.latent_dim,
            self.other_formats,
        )

    def of_layers(self, layers: Sequence[int]) -> AttentionSpec:
        """Return the same of some layers alone, which are then numbered from 0 on."""
        return replace(
            self,
            num_layers=len(layers),
            windows=tuple(self.windows[layer] for layer in layers),
            sinks=None if self.sinks is None else tuple(self.sinks[layer] for layer in layers),
            other_formats={
                index: self.other_formats[layer]
                for index, layer in enumerate(layers)
                if layer in self.other_formats
            },
        )

    @property
    def value_dim(self) -> int:
        """Return the elements of a value, and of a head's result."""
        return self.latent_dim or self.head_dim

    @property
    def widest_window(self) -> int | None:
        """Return how many tokens back any layer sees; None: a layer sees all of them."""
        windows = [window for window in self.windows if window is not None]
        return max(windows) if len(windows) == len(self.windows) else None

    @property
    def view(self) -> View:
        """Return the view of the whole model: without a window if a layer has none."""
        widest = self.widest_window
        return FULL_VIEW if widest is None else View(window=widest)

    @property
    def beyond_softmax(self) -> str:
        """Return why kernels of plain softmax cannot serve this model; empty where they can."""
        if self.softcap is not None:
            return "the model caps its attention scores"
        return "" if self.sinks is None else "the model has attention sinks"

    @property
    def beyond_two_planes(self) -> str:
        """Return why kernels with a plane of values cannot serve it; empty where they can."""
        return "values are the first elements of keys (latent attention)" if self.latent_dim else ""


@dataclass(frozen=True, slots=True)
class RowViews:
    """The views that rows have beside the model's own, as in `cache.view.View`.

    The query at `t` reads the key at `s <= t` if `s < sinks` or `t - s < window`. From
    `t = sinks + window` on, when a view hides keys, it meets the sinks as if it stood at
    `sinks + window - 1`, as in StreamingLLM (arXiv:2309.17453). There windows of the layer count
    from this position, too.
    """

    #: int32 `[rows]` each; of rows without a view 0 and the largest int.
    sinks: Tensor
    windows: Tensor
    #: int64 `[tokens]`: the position towards the sinks; -1 for queries that meet all keys alike.
    sink_positions: Tensor
    #: Whether any query has a position towards sinks.
    has_sinks: bool

    def max_keys(self, row: int) -> int:
        """Return how many first positions of a row have queries that read all keys before them."""
        return int(self.sinks[row]) + int(self.windows[row])


class QueryCopy:
    """The rotated queries of some tokens of a step, in all layers."""

    def __init__(self, spec: AttentionSpec, tokens: Tensor, num_tokens: int) -> None:
        """`tokens`: int64, indices into the flat batch of `num_tokens`."""
        self._tokens = tokens
        #: int64 `[num_tokens]`: each token's index in `tokens`, -1 for the others.
        self._rows = torch.full((num_tokens,), -1)
        self._rows[tokens] = torch.arange(len(tokens))
        #: float32 `[layers, len(tokens), heads, head_dim]`.
        self.queries = torch.empty(spec.num_layers, len(tokens), spec.num_heads, spec.head_dim)

    def add(self, layer: int, q: Tensor) -> None:
        """Copy from the queries of all tokens of the step, `[tokens, heads, head_dim]`."""
        self.queries[layer] = q[self._tokens].view(self.queries.shape[1:])

    def pointers(self) -> tuple[int, int, int]:
        """Return the addresses of `rows` and `queries` for compiled code, and the rows of these."""
        return self._rows.data_ptr(), self.queries.data_ptr(), len(self._tokens)


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The rows of one step: tokens whose keys are stored, then attend to the stored keys.

    A *position* counts the tokens of the text: it rotates queries and keys. A *stored index* counts
    the row's stored keys: it finds a key in the block table, and windows compare it. The two differ
    once a sequence has dropped keys, so a backend never derives a position from a length. Row i's
    queries have the last indices below `seq_lens[i]`, and read no key before the window of the
    first of them: pages behind it may hold anything, NaN included.

    A recorded step may have rows without a query, and tokens behind those of the last row: nothing
    reads their results, but their keys are stored.

    Tensors are on the model's device; int32 but for `positions` and `kv_slots` (int64).
    """

    #: `[rows + 1]`: row i's tokens are `query_starts[i]:query_starts[i + 1]` of the flat batch.
    query_starts: Tensor
    #: `[rows]`: stored keys of each row, the step's own included.
    seq_lens: Tensor
    #: `[rows, max_pages]`: page ids; entries that the row does not read are any valid page.
    block_table: Tensor
    #: `[tokens]`: each token's position in its text.
    positions: Tensor
    #: `[tokens]`: page * page_size + offset, where each token's key and value go.
    kv_slots: Tensor
    max_query_len: int
    max_seq_len: int
    #: Of each row, on the host: its sequence's own index, as long as it runs.
    slots: tuple[int, ...] = ()
    #: None: all rows have the model's own view.
    views: RowViews | None = None
    #: The same rows in the pages of the windowed layers, where these have pages of their own: with
    #: another `block_table` and other `kv_slots`.
    windowed: AttentionBatch | None = None

    @property
    def has_sinks(self) -> bool:
        """Whether `attend` needs queries towards sinks."""
        return self.views is not None and self.views.has_sinks

    def first_keys(self, window: int) -> Tensor:
        """Return `[rows]`, int32: the first stored index that a row's queries see in a window."""
        return (self.seq_lens - self.query_starts.diff() - window + 1).clamp(min=0)


class AttentionBackend(Protocol):
    """Causal grouped-query attention over the pool's pages."""

    #: As on the command line.
    name: str

    def plan(self, batch: AttentionBatch) -> None:
        """Set the rows that every `attend` until the next `plan` is for."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sink_q: Tensor | None = None
    ) -> Tensor:
        """Write k and v to their pages, then attend.

        q is `[tokens, heads, head_dim]`, k and v `[tokens, kv_heads, head_dim]` (rotated already;
        any strides with a contiguous last dimension). With a latent layout v is the first
        `value_dim` elements of k. Returns `[tokens, heads * value_dim]`.
        `sink_q`: q rotated to `RowViews.sink_positions`; needed if `AttentionBatch.has_sinks`.
        """


class PagedAttention(ABC):
    """An `AttentionBackend` that reads keys and values which other code may have stored."""

    name: str

    def __init__(self, spec: AttentionSpec, pool: KVPool) -> None:
        self._spec = spec
        self._pool = pool
        self._planned: AttentionBatch | None = None

    def plan(self, batch: AttentionBatch) -> None:
        """See `AttentionBackend`."""
        self._planned = batch

    @property
    def _batch(self) -> AttentionBatch:
        assert self._planned is not None, "attend before plan"
        return self._planned

    @property
    def kv_slots(self) -> Tensor:
        """Return the slots of the planned step's keys and values, as in `AttentionBatch`."""
        return self._batch.kv_slots

    def pages(self, layer: int) -> LayerPages:
        """Return the pages of a layer."""
        return self._pool.pages(layer)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sink_q: Tensor | None = None
    ) -> Tensor:
        """See `AttentionBackend`."""
        self.store(layer, k, v)
        return self.read(layer, q, sink_q)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write k and v, as of `attend`, to their pages.

        In pages of floats a value that is not finite becomes zero, and its key NaN. Of keys
        that a query does not see kernels mask the scores. But they multiply values by a weight of
        zero, and NaN there would harm earlier queries of its row.
        """
        kv_format = self._pool.layout.format_of(layer)
        if kv_format.coding is None:
            v = v.to(kv_format.storage)
            is_lost = ~v.isfinite().all(-1, keepdim=True)
            k, v = k.masked_fill(is_lost, torch.nan), v.masked_fill(is_lost, 0.0)
        self._pool.store(layer, self.kv_slots, k, v)

    @abstractmethod
    def read(self, layer: int, q: Tensor, sink_q: Tensor | None = None) -> Tensor:
        """Attend to keys and values that are stored, the step's own included.

        `sink_q`: as of `attend`; only if `BackendOffer.reads_views`.
        """


@dataclass(frozen=True, slots=True)
class BackendOffer:
    """A backend that can run on this machine, before there is a pool."""

    name: str
    #: The pool's page size must be a multiple of it.
    page_multiple: int
    default_page_size: int
    build: Callable[[AttentionSpec, KVPool], AttentionBackend]
    #: The formats of pages it reads.
    formats: Collection[KVFormat] = FLOAT_FORMATS
    #: Whether layers may differ in it.
    reads_mixed_layers: bool = False
    #: Decisions an operator should know, one line each.
    notes: tuple[str, ...] = ()
    #: Whether rows may have views of their own.
    reads_views: bool = False

    def why_not(self, spec: AttentionSpec) -> str:
        """Return why this backend cannot serve the model's pages; empty where it can."""
        for kv_format in (spec.kv_format, *spec.other_formats.values()):
            if kv_format not in self.formats:
                names = " or ".join(one.name for one in self.formats)
                return f"pages must be in {names}, got {kv_format.name}"
        if spec.other_formats and not self.reads_mixed_layers:
            return "the pages of all layers must be in one format"
        return ""

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
