"""A decoder's layers in one compiled call (csrc/decoder.cpp), for tiled weights on a CPU.

The same arithmetic as `Transformer.forward`, operation by operation, without tensors, thread
wake-ups or Python between them. Knows nothing of how weights are packed.
"""

from __future__ import annotations

import ctypes
import weakref

import torch
from torch import Tensor

from model.architectures.arch import PRE_NORMS, GatedMlpSpec, LayerSpec, MixtureSpec
from model.architectures.transformer import (
    Decoder,
    DecoderLayer,
    GatedMlp,
    ServedDecoder,
    Transformer,
)
from model.attention.cpu import CpuAttention
from model.attention.groups import GroupedAttention, part_of
from model.attention.interface import AttentionBackend, QueryCopy, RowViews
from model.cpu.library import CpuLibrary
from model.weights.linear import Linear
from model.weights.tiled_linear import TiledLinear

#: Gates, and the values they multiply, must be whole output groups of a tile.
_INNER_MULTIPLE = 16


class CpuDecoder:
    """See `Decoder`."""

    def __init__(self, transformer: Transformer, library: CpuLibrary) -> None:
        """Use the weights of a transformer that `why_not` accepts."""
        self._transformer = transformer
        weights = transformer.weights
        arch = transformer.arch
        shape = (
            arch.hidden_size,
            arch.layers[0].mlp.intermediate_size,
            arch.num_heads,
            arch.num_kv_heads,
            arch.head_dim,
            arch.rope.rotary_dim,
        )
        pointers = [pointer for layer in weights.layers for pointer in _pointers(layer)]
        self._handle: int = library.functions.octavo_decoder_new(
            library.kernels,
            (ctypes.c_int64 * len(shape))(*shape),
            arch.rms_eps,
            (ctypes.c_int64 * len(pointers))(*pointers),
            arch.num_layers,
            transformer.cos_sin.data_ptr(),
        )
        self._forward = library.functions.octavo_decoder_forward
        weakref.finalize(self, library.functions.octavo_decoder_free, self._handle)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: AttentionBackend,
        views: RowViews | None = None,
        copy: QueryCopy | None = None,
    ) -> Tensor:
        """See `ViewedDecoder`. Attention is the one that `why_not` accepted."""
        one = attention.full if isinstance(attention, GroupedAttention) else attention
        assert isinstance(one, CpuAttention), "see why_not"
        residual = self._transformer.embed(token_ids)
        cos_sin, rows, sink_positions = None, positions, None
        if views is not None:
            cos_sin, rows = self._transformer.angles(positions)
            sink_positions = views.sink_positions if views.has_sinks else None
        rows = rows.contiguous()
        self._forward(
            self._handle,
            one.session,
            rows.data_ptr(),
            residual.data_ptr(),
            None if cos_sin is None else cos_sin.data_ptr(),
            None if sink_positions is None else sink_positions.data_ptr(),
            *((None, None, 0) if copy is None else copy.pointers()),
        )
        return residual

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Decoder`."""
        return self._transformer.logits(hidden)


def fastest_decoder(
    decoder: ServedDecoder, attention: AttentionBackend, library: CpuLibrary | None
) -> Decoder:
    """Return the compiled decoder where it can serve the model, else the decoder itself."""
    if library and isinstance(decoder, Transformer) and not why_not(decoder, attention):
        if isinstance(attention, GroupedAttention):
            _join(attention, library)
        return CpuDecoder(decoder, library)
    return decoder


def _join(attention: GroupedAttention, library: CpuLibrary) -> None:
    """Let the decoder find the pages of all layers by the session of those without a window."""
    sessions, layers = list[int](), list[int]()
    for part, index in attention.parts:
        assert isinstance(part, CpuAttention), "see why_not"
        sessions.append(part.session)
        layers.append(index)
    assert isinstance(attention.full, CpuAttention), "see why_not"
    library.functions.octavo_attention_join(
        attention.full.session,
        (ctypes.c_int64 * len(sessions))(*sessions),
        (ctypes.c_int32 * len(layers))(*layers),
        len(layers),
    )


def why_not(transformer: Transformer, attention: AttentionBackend) -> str:
    """Return why the compiled decoder cannot serve a model; empty where it can."""
    if not isinstance(part_of(attention, 0)[0], CpuAttention):
        return f"attention backend {attention.name} is not the compiled one"
    specs = transformer.arch.layers
    if transformer.arch.latent or any(isinstance(spec.mlp, MixtureSpec) for spec in specs):
        return "attention is latent, or layers have experts"
    if reason := next(filter(None, map(_why_not_layer, specs)), ""):
        return reason
    if len({spec.mlp.intermediate_size for spec in specs}) > 1:
        return "layers differ in intermediate_size"
    for layer in transformer.weights.layers:
        if not all(isinstance(one, TiledLinear) for one in _products(layer)):
            return f"weights in {transformer.format} are not in tiles"
    return ""


def _why_not_layer(spec: LayerSpec) -> str:
    assert isinstance(spec.mlp, GatedMlpSpec), "see why_not"
    if spec.norms != PRE_NORMS:
        return "norms are not those before attention and MLP"
    if spec.qk_norm == "all_heads":
        return "q and k have norms over all heads"
    if spec.mlp.activation != "silu":
        return f"activation {spec.mlp.activation} is not silu"
    if spec.residual_multiplier != 1:
        return "residual updates have a factor"
    if spec.mlp.intermediate_size % _INNER_MULTIPLE:
        return f"intermediate_size is no multiple of {_INNER_MULTIPLE}"
    return ""


def _products(layer: DecoderLayer) -> tuple[Linear, ...]:
    assert isinstance(layer.mlp, GatedMlp), "see why_not"
    return layer.qkv, layer.o, layer.mlp.gate_up, layer.mlp.down


def _pointers(layer: DecoderLayer) -> tuple[int, ...]:
    """Return the addresses in the order of csrc/decoder.cpp's `Layer`."""
    qkv, o, gate_up, down = map(_description, _products(layer))
    return (
        _address(layer.norms["attention_input"]),
        *qkv,
        _address(layer.q_norm),
        _address(layer.k_norm),
        *o,
        _address(layer.norms["mlp_input"]),
        *gate_up,
        *down,
    )


def _description(linear: Linear) -> tuple[int, ...]:
    assert isinstance(linear, TiledLinear), "see why_not"
    return linear.description


def _address(norm: Tensor | None) -> int:
    assert norm is None or norm.dtype == torch.float32, "norms are kept in float32"
    return 0 if norm is None else norm.data_ptr()
