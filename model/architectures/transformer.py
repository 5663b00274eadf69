"""The decoder stack of the Llama shape: Llama, SmolLM2, Mistral, Qwen2, Qwen3.

A pre-norm residual stream kept in float32 whatever the matrix products run in. Knows nothing of
pages (`AttentionBackend`), of packed layouts (`Linear`), of files (`model/weights/load.py` builds
it) or of sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from model.architectures.arch import ArchSpec, DecoderShape
from model.architectures.rope import cos_sin_table
from model.attention.interface import AttentionBackend, AttentionSpec
from model.kv.format import KVFormat
from model.ops import Ops
from model.weights.linear import Format, Linear


class Decoder(Protocol):
    """Token ids and positions in, hidden states and logits out; called in inference mode."""

    def forward(self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        """Run the layers over a planned batch.

        Both inputs are int64 `[tokens]`. Returns float32 `[tokens, hidden]`, before the final
        norm: `logits` applies it to the rows that are wanted.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 `[rows, vocab]` for rows of what `forward` returned."""


class ServedDecoder(Decoder, Protocol):
    """A decoder that was loaded, with what has to be known to make pages for it."""

    #: Of the linear layers.
    format: Format
    weights_bytes: int
    #: Dtype of q, k, v and of what attention returns.
    attention_dtype: torch.dtype
    device: torch.device

    @property
    def arch(self) -> DecoderShape:
        """What its pages are made of."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Say, for the operator, why it is this format and whose code computes."""

    #: What `hold_positions` takes for each.
    bytes_per_position: int

    def attention_spec(self, kv_format: KVFormat) -> AttentionSpec:
        """Say what an attention backend has to know of this model."""

    def hold_positions(self, max_positions: int) -> None:
        """Make the table of angles for positions below this, the longest that was planned for."""


class Embedding(Protocol):
    """What each token of the vocabulary begins as."""

    num_bytes: int

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Return new float32 `[tokens, hidden]` for int64 `[tokens]`."""


class PlainEmbedding:
    """See `Embedding`: a `[vocab, hidden]` table in any floating dtype."""

    def __init__(self, table: Tensor) -> None:
        self.num_bytes = table.nbytes
        self._table = table

    def __call__(self, token_ids: Tensor) -> Tensor:
        """See `Embedding`."""
        return functional.embedding(token_ids, self._table).float()


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer's weights: q, k and v are one product, gate and up another."""

    input_norm: Tensor
    qkv: Linear
    #: Both None, or both `[head_dim]`.
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class TransformerWeights:
    """All a decoder multiplies with."""

    embedding: Embedding
    layers: tuple[DecoderLayer, ...]
    final_norm: Tensor
    lm_head: Linear
    #: Divisors of rope's frequencies; None: the file has none.
    rope_factors: Tensor | None
    #: Whether `lm_head` multiplies with the embedding itself.
    is_head_shared: bool

    @property
    def num_bytes(self) -> int:
        """All of it but the divisors, which are few."""
        kept = [self.final_norm]
        packed = [] if self.is_head_shared else [self.lm_head]
        for layer in self.layers:
            norms = (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
            kept += [norm for norm in norms if norm is not None]
            packed += [layer.qkv, layer.o, layer.gate_up, layer.down]
        others = sum(one.nbytes for one in kept) + sum(one.weight_bytes for one in packed)
        return self.embedding.num_bytes + others


class Transformer:
    """See `ServedDecoder`: with torch, on any device, for any packed format."""

    def __init__(
        self,
        arch: ArchSpec,
        weights: TransformerWeights,
        ops: Ops,
        fmt: Format,
        notes: tuple[str, ...],
    ) -> None:
        self.arch = arch
        self.format = fmt
        self.notes = notes
        self.weights_bytes = weights.num_bytes
        self.attention_dtype = weights.layers[0].qkv.out_dtype
        self.device = weights.final_norm.device
        self.weights = weights
        #: float32: a row of the table of angles.
        self.bytes_per_position = 4 * arch.rope.rotary_dim
        self._ops = ops
        self._cos_sin: Tensor | None = None

    def hold_positions(self, max_positions: int) -> None:
        """See `ServedDecoder`."""
        table = cos_sin_table(self.arch.rope, max_positions, self.weights.rope_factors)
        self._cos_sin = table.to(self.device)

    @property
    def cos_sin(self) -> Tensor:
        """Float32 `[positions, rotary_dim]`; as many as the model has, unless told otherwise."""
        if self._cos_sin is None:
            self.hold_positions(self.arch.max_positions)
        assert self._cos_sin is not None
        return self._cos_sin

    def attention_spec(self, kv_format: KVFormat) -> AttentionSpec:
        """See `ServedDecoder`."""
        arch = self.arch
        return AttentionSpec(
            num_layers=arch.num_layers,
            num_heads=arch.num_heads,
            num_kv_heads=arch.num_kv_heads,
            head_dim=arch.head_dim,
            scale=arch.head_dim**-0.5,
            windows=arch.windows,
            dtype=self.attention_dtype,
            kv_format=kv_format,
            device=self.device,
        )

    def forward(self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        """See `Decoder`."""
        return self.run_layers(
            token_ids,
            self._ops,
            lambda index, layer, x: self._attend(index, layer, x, positions, attention),
        )

    def run_layers(
        self,
        token_ids: Tensor,
        ops: Ops,
        attend: Callable[[int, DecoderLayer, Tensor], Tensor],
    ) -> Tensor:
        """Run the layers with these operations; `attend` is what comes between the norms."""
        eps = self.arch.rms_eps
        residual = self.weights.embedding(token_ids)
        update: Tensor | None = None
        for index, layer in enumerate(self.weights.layers):
            dtype = layer.qkv.in_dtype
            if update is None:
                x = ops.rms_norm(residual, layer.input_norm, eps, dtype)
            else:
                x = ops.add_rms_norm(update, residual, layer.input_norm, eps, dtype)
            x = attend(index, layer, x)
            x = ops.add_rms_norm(x, residual, layer.post_norm, eps, layer.gate_up.in_dtype)
            update = layer.down(ops.silu_and_mul(layer.gate_up(x)))
        assert update is not None
        return residual.add_(update)

    def _attend(
        self,
        index: int,
        layer: DecoderLayer,
        x: Tensor,
        positions: Tensor,
        attention: AttentionBackend,
    ) -> Tensor:
        arch, ops = self.arch, self._ops
        num_heads, num_kv_heads = arch.num_heads, arch.num_kv_heads
        qkv = layer.qkv(x).view(-1, num_heads + 2 * num_kv_heads, arch.head_dim)
        q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)  # type: ignore[no-untyped-call] # torch's
        if layer.q_norm is not None and layer.k_norm is not None:
            q = ops.rms_norm(q, layer.q_norm, arch.rms_eps, q.dtype)
            k = ops.rms_norm(k, layer.k_norm, arch.rms_eps, k.dtype)
        ops.apply_rope(q, k, positions, self.cos_sin)
        return layer.o(attention.attend(index, q, k, v))

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Decoder`."""
        weights = self.weights
        head = weights.lm_head
        x = self._ops.rms_norm(hidden, weights.final_norm, self.arch.rms_eps, head.in_dtype)
        return head(x).float()
