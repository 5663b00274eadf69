"""The decoder's layers on CUDA: the arithmetic of `Transformer.forward` in fewer passes.

Rotation writes keys and values straight to pages of floats, so attention has only to read. Codes
are of the rotated keys as they are rounded, so they are written after it. Knows nothing of how
pages are read (`PagedAttention`) or of the kernels (`GpuOps`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.architectures.transformer import DecoderLayer, Transformer
from model.attention.groups import part_of
from model.attention.interface import AttentionBackend, PagedAttention, QueryCopy, RowViews
from model.cuda.ops import GpuOps, SinkQueries


class _Rotation(NamedTuple):
    """The positions of a step's tokens, as rows of a table of angles."""

    rows: Tensor
    cos_sin: Tensor
    #: Positions towards sinks, and the table that has them; None: no row has sinks.
    to_sinks: tuple[Tensor, Tensor] | None = None


class GpuDecoder:
    """See `ViewedDecoder`; attention is a `PagedAttention`, or one for each group of layers.

    Nothing here waits for the device.
    """

    def __init__(self, transformer: Transformer, ops: GpuOps) -> None:
        self._transformer = transformer
        self._ops = ops

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: AttentionBackend,
        views: RowViews | None = None,
        copy: QueryCopy | None = None,
    ) -> Tensor:
        """See `ViewedDecoder`."""
        assert copy is None, "see `model.key_selection.why_not`"
        rotation = self._rotation(positions, views)
        return self._transformer.run_layers(
            token_ids,
            self._ops,
            lambda index, layer, x: self._attend(index, layer, x, rotation, attention),
        )

    def _rotation(self, positions: Tensor, views: RowViews | None) -> _Rotation:
        held = self._transformer.cos_sin
        if views is None:
            return _Rotation(positions, held)
        # A table of this step alone, since its positions may be behind the held ones.
        angles = self._transformer.late_angles(positions)
        rows = torch.arange(len(positions), device=positions.device)
        return _Rotation(rows, angles, (views.sink_positions, held) if views.has_sinks else None)

    def _attend(
        self,
        index: int,
        layer: DecoderLayer,
        x: Tensor,
        rotation: _Rotation,
        attention: AttentionBackend,
    ) -> Tensor:
        paged, index = part_of(attention, index)
        assert isinstance(paged, PagedAttention), "see assemble_on_gpu"
        q, k, v = self._transformer.qkv(layer, x, self._ops)
        rows, cos_sin, to_sinks = rotation
        sinks = None
        if to_sinks is not None:
            sinks = SinkQueries(torch.empty(q.shape, dtype=q.dtype, device=q.device), *to_sinks)
        keys, values, scales = paged.pages(index)
        pages = None if scales else (keys, values, paged.kv_slots)
        self._ops.rope_and_store(q, k, v, rows, cos_sin, pages, sinks)
        if scales:
            paged.store(index, k, v)
        return layer.o(paged.read(index, q, None if sinks is None else sinks.q))

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Decoder`."""
        return self._transformer.logits(hidden)
