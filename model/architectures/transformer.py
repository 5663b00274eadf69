"""The decoder layers with torch, for every architecture that an `ArchSpec` describes.

The residual stream is float32, whatever dtype the matrix products run in. Knows nothing of
pages (`AttentionBackend`), of packed layouts (`Linear`), of files (`model/weights/load.py` builds
it) or of sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from model.architectures.arch import Activation, ArchSpec, DecoderShape, LayerSpec, NormPlace
from model.architectures.rope import cos_sin_rows, cos_sin_table, late_frequencies
from model.attention.interface import AttentionBackend, AttentionSpec, QueryCopy, RowViews
from model.kv.format import KVFormat
from model.ops import Ops
from model.weights.linear import Format, Linear


class Decoder(Protocol):
    """Token ids and positions in, hidden states and logits out; called in inference mode."""

    def forward(self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor:
        """Run the layers over a planned batch.

        Both inputs are int64 `[tokens]`. Returns float32 `[tokens, hidden]`, before the final
        norm, which `logits` applies to the rows it is given.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 `[rows, vocab]` for rows of the result of `forward`."""


class ViewedDecoder(Decoder, Protocol):
    """A decoder for rows with views of their own, which `BackendOffer.reads_views` allows."""

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: AttentionBackend,
        views: RowViews | None = None,
        copy: QueryCopy | None = None,
    ) -> Tensor:
        """See `Decoder`. Under `views`, positions may exceed the held ones.

        `copy`: gets the queries of some tokens.
        """


class ServedDecoder(Decoder, Protocol):
    """A loaded decoder, with the properties that its pages depend on."""

    #: Of the linear layers.
    format: Format
    weights_bytes: int
    #: Dtype of q, k, v and of the result of attention.
    attention_dtype: torch.dtype
    device: torch.device

    @property
    def arch(self) -> DecoderShape:
        """Return the sizes of its pages."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Return reasons for the format and the implementation, for the operator."""

    #: Memory that `hold_positions` takes for each.
    bytes_per_position: int

    def attention_spec(self, kv_format: KVFormat) -> AttentionSpec:
        """Return the properties of this model that an attention backend depends on."""

    def hold_positions(self, max_positions: int) -> None:
        """Compute the table of angles for positions below this, the longest planned."""


class Mlp(Protocol):
    """The second block of a layer: `[rows, hidden]` of `in_dtype` to as many new values."""

    in_dtype: torch.dtype

    def __call__(self, x: Tensor, ops: Ops) -> Tensor:
        """Compute the block for contiguous rows."""


class GatedMlp:
    """See `Mlp` and `GatedMlpSpec`; gate and up are one product."""

    def __init__(self, gate_up: Linear, down: Linear, activation: Activation) -> None:
        self.gate_up, self.down, self._activation = gate_up, down, activation
        self.in_dtype = gate_up.in_dtype

    def __call__(self, x: Tensor, ops: Ops) -> Tensor:
        """See `Mlp`."""
        gate_up = self.gate_up(x)
        if self._activation == "silu":
            return self.down(ops.silu_and_mul(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down(functional.gelu(gate, approximate="tanh") * up)


@dataclass(frozen=True, slots=True)
class LatentWeights:
    """The products within latent attention: see `model/architectures/latent_transformer.py`."""

    #: From a normed vector to the queries; None: `DecoderLayer.qkv` computes these.
    q_up: Linear | None
    #: `[heads, plain_dim + value_dim, rank]`: from a latent vector to each head's key and value.
    kv_up: Tensor


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer's weights; q, k and v are one product.

    With latent attention the product gives queries, or the vector that they are computed from, then
    the latent vector and the rotated one. `q_norm` and `k_norm` are for the two unrotated vectors.
    """

    spec: LayerSpec
    norms: Mapping[NormPlace, Tensor]
    qkv: Linear
    #: None where there is none, else of the size that `LayerSpec.qk_norm` means.
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    mlp: Mlp
    #: Of a layer with latent attention, in addition.
    latent: LatentWeights | None = None


@dataclass(frozen=True, slots=True)
class TransformerWeights:
    """All weights of a decoder."""

    #: New float32 `[tokens, hidden]` for int64 `[tokens]`.
    embedding: Callable[[Tensor], Tensor]
    layers: tuple[DecoderLayer, ...]
    final_norm: Tensor
    lm_head: Linear
    #: Divisors of rope's frequencies, from the file; None if it has none.
    rope_factors: Tensor | None
    #: Memory of them all but the few divisors.
    num_bytes: int


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
        self._late_frequencies: Tensor | None = None

    def hold_positions(self, max_positions: int) -> None:
        """See `ServedDecoder`."""
        rope, factors = self.arch.rope, self.weights.rope_factors
        self._cos_sin = cos_sin_table(rope, max_positions, factors).to(self.device)
        self._late_frequencies = late_frequencies(rope, max_positions, factors).to(self.device)

    @property
    def cos_sin(self) -> Tensor:
        """Return float32 `[positions, rotary_dim]`, by default for all the model's positions."""
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
            latent_dim=arch.latent.rank if arch.latent else None,
            scale=arch.layers[0].scale,
            softcap=arch.layers[0].softcap,
            windows=arch.windows,
            dtype=self.attention_dtype,
            kv_format=kv_format,
            device=self.device,
        )

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return a table of angles, and the rows of these positions in it."""
        if int(positions.max()) < len(self.cos_sin):
            return self.cos_sin, positions
        return self.late_angles(positions), torch.arange(len(positions), device=self.device)

    def late_angles(self, positions: Tensor) -> Tensor:
        """Return the angles of these positions, some of which may be behind the held ones."""
        table, frequencies = self.cos_sin, self._late_frequencies
        assert frequencies is not None, "see hold_positions"
        return cos_sin_rows(self.arch.rope, table, positions, frequencies)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: AttentionBackend,
        views: RowViews | None = None,
        copy: QueryCopy | None = None,
    ) -> Tensor:
        """See `Decoder` and `ViewedDecoder`."""
        cos_sin, rows = (self.cos_sin, positions) if views is None else self.angles(positions)

        def attend(index: int, layer: DecoderLayer, x: Tensor) -> Tensor:
            q, k, v = self.qkv(layer, x, self._ops)
            sink_q = None
            if views is not None and views.has_sinks:
                sink_q = q.clone()
                # A position towards the sinks is always held. There are no keys to rotate.
                at = views.sink_positions.clamp(min=0)
                self.rotate(sink_q, sink_q[:, :0], at, self.cos_sin)
            self.rotate(q, k, rows, cos_sin)
            if copy is not None:
                copy.add(index, q)
            return self.output(layer, attention.attend(index, q, k, v, sink_q))

        return self.run_layers(token_ids, self._ops, attend)

    def run_layers(
        self,
        token_ids: Tensor,
        ops: Ops,
        attend: Callable[[int, DecoderLayer, Tensor], Tensor],
    ) -> Tensor:
        """Run the layers with these operations; `attend` computes the attention block."""
        eps = self.arch.rms_eps
        residual = self.embed(token_ids)
        update: Tensor | None = None

        def enter(norm: Tensor | None, dtype: torch.dtype) -> Tensor:
            """Add the previous block's output to the residual; return the next block's input."""
            if norm is None:
                return (residual if update is None else residual.add_(update)).to(dtype)
            if update is None:
                return ops.rms_norm(residual, norm, eps, dtype)
            return ops.add_rms_norm(update, residual, norm, eps, dtype)

        def leave(x: Tensor, norm: Tensor | None, multiplier: float) -> Tensor:
            """Return a block's output as it is added to the residual."""
            x = x if norm is None else ops.rms_norm(x, norm, eps, x.dtype)
            return x if multiplier == 1 else x * multiplier

        for index, layer in enumerate(self.weights.layers):
            norms, multiplier = layer.norms, layer.spec.residual_multiplier
            x = attend(index, layer, enter(norms.get("attention_input"), layer.qkv.in_dtype))
            update = leave(x, norms.get("attention_output"), multiplier)
            x = layer.mlp(enter(norms.get("mlp_input"), layer.mlp.in_dtype), ops)
            update = leave(x, norms.get("mlp_output"), multiplier)
        assert update is not None
        return residual.add_(update)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return float32 `[tokens, hidden]`: the input of the first layer."""
        x, multiplier = self.weights.embedding(token_ids), self.arch.embedding_multiplier
        return x if multiplier == 1 else x.mul_(multiplier)

    def qkv(self, layer: DecoderLayer, x: Tensor, ops: Ops) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v `[tokens, heads, head_dim]`, normed where the layer has norms."""
        arch, kind = self.arch, layer.spec.qk_norm

        def normed(x: Tensor, norm: Tensor | None) -> Tensor:
            return x if norm is None else ops.rms_norm(x, norm, arch.rms_eps, x.dtype)

        sizes = [one * arch.head_dim for one in (arch.num_heads, arch.num_kv_heads)]
        q, k, v = layer.qkv(x).split([*sizes, sizes[1]], dim=1)  # type: ignore[no-untyped-call] # torch's
        if kind == "all_heads":
            q, k = normed(q, layer.q_norm), normed(k, layer.k_norm)
        q, k, v = (one.unflatten(1, (-1, arch.head_dim)) for one in (q, k, v))
        if kind == "head":
            q, k = normed(q, layer.q_norm), normed(k, layer.k_norm)
        return q, k, v

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        """Rotate q and k in place, see `Ops.apply_rope`."""
        self._ops.apply_rope(q, k, positions, cos_sin)

    def output(self, layer: DecoderLayer, attended: Tensor) -> Tensor:
        """Return the attention block's output from the result of attention."""
        return layer.o(attended)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Decoder`."""
        weights, arch = self.weights, self.arch
        head = weights.lm_head
        x = self._ops.rms_norm(hidden, weights.final_norm, arch.rms_eps, head.in_dtype)
        logits = head(x).float()
        if arch.logits_divisor != 1:
            logits.div_(arch.logits_divisor)
        if arch.logits_softcap is not None:
            logits.div_(arch.logits_softcap).tanh_().mul_(arch.logits_softcap)
        return logits
