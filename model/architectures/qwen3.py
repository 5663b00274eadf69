"""Qwen3: Qwen2 with a norm on each head of q and k, and biases only if asked for."""

from __future__ import annotations

from dataclasses import replace

from model.architectures import arch_gguf, arch_hf
from model.architectures.arch import ArchSpec, ConfigKeys, Family, Shapes
from model.architectures.qwen2 import read_hf_windows
from model.architectures.tensors import layer_tensors


def _read_hf(keys: ConfigKeys) -> ArchSpec:
    arch = arch_hf.read_dense(keys, max_positions=32768, num_kv_heads=32, head_dim=128)
    biases = arch_hf.attention_biases(keys)
    layer = replace(arch.layers[0], biases=biases, qk_norm="head")
    return arch.with_layers(layer, read_hf_windows(keys, arch.num_layers))


def _read_gguf(keys: ConfigKeys, shapes: Shapes) -> ArchSpec:
    arch = arch_gguf.read_windowed(keys, shapes)
    return arch.with_layers(replace(arch.layers[0], qk_norm="head"))


FAMILY = Family(_read_hf, _read_gguf, layer_tensors)
