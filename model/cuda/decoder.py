"""The decoder's layers on CUDA: the arithmetic of `Transformer.forward` in fewer passes.

Rotation writes keys and values straight to pages of floats, so attention has only to read. Codes
are of the rotated keys as they are rounded, so they are written after it. Knows nothing of how
pages are read (`PagedAttention`) or of the kernels (`GpuOps`).
"""

from __future__ import annotations

from torch import Tensor

from model.architectures.transformer import DecoderLayer, Transformer
from model.attention.groups import part_of
from model.attention.interface import AttentionBackend, PagedAttention
from model.cuda.ops import GpuOps


class GpuDecoder:
    """See `Decoder`; attention is a `PagedAttention`, or one for each group of layers."""

    def __init__(self, transformer: Transformer, ops: GpuOps) -> None:
        self._transformer = transformer
        self._ops = ops

    def forward(self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        """See `Decoder`."""
        return self._transformer.run_layers(
            token_ids,
            self._ops,
            lambda index, layer, x: self._attend(index, layer, x, positions, attention),
        )

    def _attend(
        self,
        index: int,
        layer: DecoderLayer,
        x: Tensor,
        positions: Tensor,
        attention: AttentionBackend,
    ) -> Tensor:
        paged, index = part_of(attention, index)
        assert isinstance(paged, PagedAttention), "see assemble_on_gpu"
        q, k, v = self._transformer.qkv(layer, x, self._ops)
        cos_sin, (keys, values, scales) = self._transformer.cos_sin, paged.pages(index)
        if scales:
            self._ops.apply_rope(q, k, positions, cos_sin)
            paged.store(index, k, v)
        else:
            pages = keys, values, paged.kv_slots
            self._ops.rope_and_store(q, k, v, positions, cos_sin, pages)
        return layer.o(paged.read(index, q))

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Decoder`."""
        return self._transformer.logits(hidden)
