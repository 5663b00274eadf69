"""Granite: Llama with factors on embeddings, scores, residual updates and logits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from model.architectures import arch_gguf, llama
from model.architectures.arch import ArchError, ArchSpec, ConfigKeys, Family, Shapes
from model.architectures.tensors import layer_tensors


def _read_hf(keys: ConfigKeys) -> ArchSpec:
    return _with_factors(
        llama.FAMILY.read_hf(keys),
        scale=keys.number("attention_multiplier", 1.0),
        residual=keys.number("residual_multiplier", 1.0),
        embedding=keys.number("embedding_multiplier", 1.0),
        logits=keys.number("logits_scaling", 1.0),
    )


def _read_gguf(keys: ConfigKeys, shapes: Shapes) -> ArchSpec:
    return _with_factors(
        arch_gguf.read_whole_heads(keys, shapes),
        scale=keys.number("attention.scale"),
        residual=keys.number("residual_scale"),
        embedding=keys.number("embedding_scale"),
        logits=keys.number("logit_scale"),
    )


def _with_factors(
    arch: ArchSpec, *, scale: float, residual: float, embedding: float, logits: float
) -> ArchSpec:
    if logits == 0:
        raise ArchError("logits_scaling must not be 0")
    layer = replace(arch.layers[0], scale=scale, residual_multiplier=residual)
    arch = replace(arch, embedding_multiplier=embedding, logits_divisor=logits)
    return arch.with_layers(layer)


FAMILY = Family(_read_hf, _read_gguf, partial(layer_tensors, is_interleaved=True))
