"""Gemma 2: four norms a layer, capped scores and logits, and a window in every other layer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from model.architectures import arch_gguf, arch_hf
from model.architectures.arch import ArchError, ArchSpec, ConfigKeys, Family, GatedMlpSpec, Shapes
from model.architectures.tensors import NormNames, layer_tensors

_NORMS: NormNames = {
    "attention_input": ("input_layernorm", "attn_norm"),
    "attention_output": ("post_attention_layernorm", "post_attention_norm"),
    "mlp_input": ("pre_feedforward_layernorm", "ffn_norm"),
    "mlp_output": ("post_feedforward_layernorm", "post_ffw_norm"),
}
#: Of the 27B model, the one whose scale of scores is not that of its heads.
_LARGEST_NUM_LAYERS = 46


def _read_hf(keys: ConfigKeys) -> ArchSpec:
    arch = arch_hf.read_dense(keys, max_positions=8192, num_kv_heads=4, head_dim=256, is_tied=True)
    keys.refuse_unless("hidden_activation", "gelu_pytorch_tanh")
    keys.refuse_unless("use_bidirectional_attention", 0)
    # A key of early files, which `transformers` ignores.
    keys.get("hidden_act")
    biases = arch_hf.attention_biases(keys)
    query_scalar = keys.number("query_pre_attn_scalar", 256)
    if query_scalar <= 0:
        raise ArchError("query_pre_attn_scalar must be above 0")
    layer = replace(arch.layers[0], biases=biases, scale=query_scalar**-0.5)
    window = arch_hf.window_size(keys)
    windows = arch_hf.windows_by_type(keys, window, _every_other(window, arch.num_layers))
    # Safetensors hold norms' weights less one, GGUF holds them whole.
    arch = replace(arch.with_layers(layer, windows), norm_offset=1.0)
    scores = _cap(keys, "attn_logit_softcapping", 50.0)
    return _with_caps(arch, scores, _cap(keys, "final_logit_softcapping", 30.0))


def _cap(keys: ConfigKeys, key: str, default: float) -> float | None:
    """Read a cap: null means none, an absent key the default of `transformers`."""
    cap = keys.maybe_number(key) if key in keys else default
    if cap is not None and cap <= 0:
        raise ArchError(f"{key} must be above 0")
    return cap


def _read_gguf(keys: ConfigKeys, shapes: Shapes) -> ArchSpec:
    arch = arch_gguf.read_dense(keys, shapes)
    layer = arch.layers[0]
    if arch.num_layers == _LARGEST_NUM_LAYERS:
        layer = replace(layer, scale=(arch.hidden_size / arch.num_heads) ** -0.5)
    window = keys.count("attention.sliding_window", 4096)
    arch = arch.with_layers(layer, _every_other(window, arch.num_layers))
    # Zero means none.
    scores = keys.number("attn_logit_softcapping", 50.0) or None
    return _with_caps(arch, scores, keys.number("final_logit_softcapping", 30.0) or None)


def _every_other(window: int | None, num_layers: int) -> tuple[int | None, ...]:
    return tuple(None if index % 2 else window for index in range(num_layers))


def _with_caps(arch: ArchSpec, scores: float | None, logits: float | None) -> ArchSpec:
    first = arch.layers[0]
    mlp = GatedMlpSpec(first.mlp.intermediate_size, "gelu_tanh")
    layer = replace(first, mlp=mlp, softcap=scores, norms=frozenset(_NORMS))
    multiplier = float(arch.hidden_size) ** 0.5
    arch = replace(arch, logits_softcap=logits, embedding_multiplier=multiplier)
    return arch.with_layers(layer)


FAMILY = Family(_read_hf, _read_gguf, partial(layer_tensors, norms=_NORMS))
