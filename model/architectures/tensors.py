"""Declarations of tensors that families share; names are relative to a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from model.architectures.arch import ArchSpec, LayerSpec, NormPlace, TensorSpec

#: For each norm its name in safetensors and in GGUF.
NormNames = Mapping[NormPlace, tuple[str, str]]
PRE_NORM_NAMES: NormNames = {
    "attention_input": ("input_layernorm", "attn_norm"),
    "mlp_input": ("post_attention_layernorm", "ffn_norm"),
}


def layer_tensors(
    arch: ArchSpec,
    layer: LayerSpec,
    norms: NormNames = PRE_NORM_NAMES,
    *,
    is_interleaved: bool = False,
) -> Iterator[TensorSpec]:
    """Declare attention, a gated MLP and norms, with Llama's names unless norms are given.

    `is_interleaved`: llama.cpp's converter reorders q and k, to rotate neighbours.
    """
    yield from attention(arch, layer, is_interleaved=is_interleaved)
    yield from gated_mlp(arch, layer)
    for place, names in norms.items():
        yield _norm(place, names, arch.hidden_size)


def attention(
    arch: ArchSpec, layer: LayerSpec, *, is_interleaved: bool = False
) -> Iterator[TensorSpec]:
    """Declare q, k, v and o, and the norms of q and k."""
    hidden = arch.hidden_size
    sizes = {"q": arch.num_heads * arch.head_dim, "k": arch.num_kv_heads * arch.head_dim}
    for one, size in (*sizes.items(), ("v", sizes["k"])):
        yield from product(
            "qkv",
            (f"self_attn.{one}_proj", f"attn_{one}"),
            (size, hidden),
            has_bias="qkv" in layer.biases,
            is_interleaved=is_interleaved and one != "v",
        )
    names = ("self_attn.o_proj", "attn_output")
    yield from product("o", names, (hidden, sizes["q"]), has_bias="o" in layer.biases)
    if layer.qk_norm:
        for one, size in sizes.items():
            names = (f"self_attn.{one}_norm", f"attn_{one}_norm")
            yield _norm(f"{one}_norm", names, arch.head_dim if layer.qk_norm == "head" else size)


def gated_mlp(arch: ArchSpec, layer: LayerSpec) -> Iterator[TensorSpec]:
    """Declare gate, up and down."""
    hidden, inner = arch.hidden_size, layer.mlp.intermediate_size
    has_bias = "mlp" in layer.biases
    for one in ("gate", "up"):
        names = (f"mlp.{one}_proj", f"ffn_{one}")
        yield from product("gate_up", names, (inner, hidden), has_bias=has_bias)
    names = ("mlp.down_proj", "ffn_down")
    yield from product("down", names, (hidden, inner), has_bias=has_bias)


def product(
    target: str,
    names: tuple[str, str],
    shape: tuple[int, int],
    *,
    has_bias: bool = False,
    is_interleaved: bool = False,
) -> Iterator[TensorSpec]:
    """Declare a matrix and its bias by their name in safetensors and in GGUF."""
    for kind, size in (("weight", shape), ("bias", shape[:1])):
        if kind == "weight" or has_bias:
            name, gguf_name = (f"{one}.{kind}" for one in names)
            yield TensorSpec(name, gguf_name, size, target, is_interleaved)


def _norm(target: str, names: tuple[str, str], size: int) -> TensorSpec:
    return TensorSpec(f"{names[0]}.weight", f"{names[1]}.weight", (size,), target)
