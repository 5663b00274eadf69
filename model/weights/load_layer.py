"""Loads the products and norms of a layer, by the targets of the tensors that its family declares.

Knows nothing of files, nor of how a product is packed.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from model.architectures.arch import ArchSpec, GatedMlpSpec, LatentSpec
from model.architectures.mixture import Mixture, Router
from model.architectures.transformer import DecoderLayer, GatedMlp, LatentWeights, Mlp
from model.weights.linear import Format, Linear


class LayerReader(Protocol):
    """Reads and packs the tensors of a target."""

    arch: ArchSpec
    #: Of the products.
    fmt: Format

    def linear(self, target: str, fmt: Format) -> Linear:
        """Pack products that share their input as one, their rows one after another."""

    def norm(self, target: str) -> Tensor:
        """Read a norm's weights, in float32."""

    def kept(self, target: str, dtype: torch.dtype) -> Tensor:
        """Read a tensor that is not packed."""


def load_layer(reader: LayerReader, index: int) -> DecoderLayer:
    """Load a layer, its largest product first."""
    arch, fmt = reader.arch, reader.fmt
    spec, latent = arch.layers[index], arch.latent
    mlp = _mlp(reader, index)
    qkv = reader.linear(f"{index}.qkv", fmt)
    has_q_norm = spec.qk_norm is not None or (latent is not None and latent.query_rank is not None)
    has_k_norm = spec.qk_norm is not None or latent is not None
    return DecoderLayer(
        spec=spec,
        mlp=mlp,
        qkv=qkv,
        o=reader.linear(f"{index}.o", fmt),
        norms={place: reader.norm(f"{index}.{place}") for place in spec.norms},
        q_norm=reader.norm(f"{index}.q_norm") if has_q_norm else None,
        k_norm=reader.norm(f"{index}.k_norm") if has_k_norm else None,
        latent=_latent(reader, index, latent, qkv.out_dtype) if latent else None,
    )


def _latent(
    reader: LayerReader, index: int, latent: LatentSpec, dtype: torch.dtype
) -> LatentWeights:
    has_q_up = latent.query_rank is not None
    # Not packed: each head has its own small product, and all of them are one batched product.
    kv_up = reader.kept(f"{index}.kv_up", dtype)
    return LatentWeights(
        q_up=reader.linear(f"{index}.q_up", reader.fmt) if has_q_up else None,
        kv_up=kv_up.view(reader.arch.num_heads, -1, latent.rank),
    )


def _mlp(reader: LayerReader, index: int) -> Mlp:
    spec = reader.arch.layers[index].mlp
    if isinstance(spec, GatedMlpSpec):
        return _gated_mlp(reader, str(index), spec)
    expert, router = GatedMlpSpec(spec.intermediate_size), spec.router
    # The widest first.
    shared = _gated_mlp(reader, str(index), expert)
    experts = [
        _gated_mlp(reader, f"{index}.experts.{one}", expert) for one in range(router.num_experts)
    ]
    weight = reader.kept(f"{index}.router", torch.float32)
    bias = reader.kept(f"{index}.router_bias", torch.float32) if router.has_bias else None
    return Mixture(Router(router, weight, bias), shared, tuple(experts))


def _gated_mlp(reader: LayerReader, target: str, spec: GatedMlpSpec) -> GatedMlp:
    gate_up = reader.linear(f"{target}.gate_up", reader.fmt)
    down = reader.linear(f"{target}.down", reader.fmt)
    return GatedMlp(gate_up, down, spec.activation)
