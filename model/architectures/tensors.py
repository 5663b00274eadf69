"""Declarations of tensors that families share; names are relative to a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from model.architectures.arch import ArchSpec, LayerSpec, NormPlace, TensorSpec

#: For each norm its name in safetensors and in GGUF.
NormNames = Mapping[NormPlace, tuple[str, str]]
_PRE_NORM_NAMES: NormNames = {
    "attention_input": ("input_layernorm", "attn_norm"),
    "mlp_input": ("post_attention_layernorm", "ffn_norm"),
}


def layer_tensors(
    arch: ArchSpec,
    layer: LayerSpec,
    norms: NormNames = _PRE_NORM_NAMES,
    *,
    is_interleaved: bool = False,
) -> Iterator[TensorSpec]:
    """Declare attention, a gated MLP and norms, with Llama's names unless norms are given.

    `is_interleaved`: llama.cpp's converter reorders q and k, to rotate neighbours.
    """
    hidden, inner = arch.hidden_size, layer.mlp.intermediate_size
    q, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    for target, part, name, gguf_name, shape in (
        ("qkv", "qkv", "self_attn.q_proj", "attn_q", (q, hidden)),
        ("qkv", "qkv", "self_attn.k_proj", "attn_k", (kv, hidden)),
        ("qkv", "qkv", "self_attn.v_proj", "attn_v", (kv, hidden)),
        ("o", "o", "self_attn.o_proj", "attn_output", (hidden, q)),
        ("gate_up", "mlp", "mlp.gate_proj", "ffn_gate", (inner, hidden)),
        ("gate_up", "mlp", "mlp.up_proj", "ffn_up", (inner, hidden)),
        ("down", "mlp", "mlp.down_proj", "ffn_down", (hidden, inner)),
    ):
        swaps = is_interleaved and gguf_name in {"attn_q", "attn_k"}
        yield TensorSpec(f"{name}.weight", f"{gguf_name}.weight", shape, target, swaps)
        if part in layer.biases:
            yield TensorSpec(f"{name}.bias", f"{gguf_name}.bias", shape[:1], target, swaps)
    if layer.qk_norm:
        sizes = (arch.head_dim, arch.head_dim) if layer.qk_norm == "head" else (q, kv)
        yield _norm("q_norm", ("self_attn.q_norm", "attn_q_norm"), sizes[0])
        yield _norm("k_norm", ("self_attn.k_norm", "attn_k_norm"), sizes[1])
    for place, names in norms.items():
        yield _norm(place, names, hidden)


def _norm(target: str, names: tuple[str, str], size: int) -> TensorSpec:
    return TensorSpec(f"{names[0]}.weight", f"{names[1]}.weight", (size,), target)
