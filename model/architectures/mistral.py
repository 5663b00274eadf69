"""Mistral: Llama with a sliding window in every layer and without biases."""

from __future__ import annotations

from functools import partial

from model.architectures import arch_gguf, arch_hf
from model.architectures.arch import ArchError, ArchSpec, ConfigKeys, Family
from model.architectures.tensors import layer_tensors


def _read_hf(keys: ConfigKeys) -> ArchSpec:
    arch = arch_hf.read_dense(keys, max_positions=131072, num_kv_heads=8)
    if "layer_types" in keys:
        raise ArchError("layer_types is not supported with model_type 'mistral'")
    return arch.with_layers(arch.layers[0], (arch_hf.window_size(keys),) * arch.num_layers)


FAMILY = Family(_read_hf, arch_gguf.read_whole_heads, partial(layer_tensors, is_interleaved=True))
