"""Llama, and models that are saved as such, SmolLM2 among them."""

from __future__ import annotations

from functools import partial

from model.architectures import arch_gguf, arch_hf
from model.architectures.arch import ArchSpec, ConfigKeys, Family
from model.architectures.tensors import layer_tensors


def _read_hf(keys: ConfigKeys) -> ArchSpec:
    biases = arch_hf.attention_biases(keys)
    if keys.flag("mlp_bias"):
        biases |= {"mlp"}
    return arch_hf.read_dense(keys, max_positions=2048, biases=biases)


FAMILY = Family(_read_hf, arch_gguf.read_whole_heads, partial(layer_tensors, is_interleaved=True))
