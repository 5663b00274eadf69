"""OLMo 2: norms on the outputs of attention and MLP, and one over all heads of q and of k."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from model.architectures import arch_gguf, arch_hf
from model.architectures.arch import ArchSpec, ConfigKeys, Family, Shapes
from model.architectures.tensors import NormNames, layer_tensors

_NORMS: NormNames = {
    "attention_output": ("post_attention_layernorm", "post_attention_norm"),
    "mlp_output": ("post_feedforward_layernorm", "post_ffw_norm"),
}


def _read_hf(keys: ConfigKeys) -> ArchSpec:
    biases = arch_hf.attention_biases(keys)
    return _with_norms(arch_hf.read_dense(keys, max_positions=2048, rms_eps=1e-5, biases=biases))


def _read_gguf(keys: ConfigKeys, shapes: Shapes) -> ArchSpec:
    return _with_norms(arch_gguf.read_dense(keys, shapes))


def _with_norms(arch: ArchSpec) -> ArchSpec:
    return arch.with_layers(replace(arch.layers[0], norms=frozenset(_NORMS), qk_norm="all_heads"))


FAMILY = Family(_read_hf, _read_gguf, partial(layer_tensors, norms=_NORMS))
