"""Reads the keys of a GGUF's metadata that families share, as llama.cpp's converter writes them.

Biases, tied embeddings and the vocabulary's size follow from the file's tensors. An unknown key of
the architecture is an error, since every one of them changes the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from model.architectures.arch import (
    MOST_LAYERS,
    ArchError,
    ArchSpec,
    BiasedPart,
    ConfigKeys,
    Dtype,
    GatedMlpSpec,
    LayerSpec,
    RopeSpec,
    RopeVariant,
    Shapes,
)
from model.formats.json_file import shown

#: general.file_type of a file that is mostly of one 16-bit type, or of float32.
_FILE_TYPE_FLOAT32, _FILE_TYPE_BFLOAT16 = 0, 32

_INERT = frozenset({"tensor_data_layout", "rope.scaling.finetuned", "expert_used_count"})


def read_dense(keys: ConfigKeys, shapes: Shapes) -> ArchSpec:
    """Read the keys that dense families share, into layers like Llama's; biases as in the file."""
    hidden_size, num_heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", hidden_size // max(num_heads, 1))
    max_positions = keys.count("context_length")
    keys.refuse_unless("attention.value_length", head_dim)
    keys.refuse_unless("expert_count", 0)
    keys.refuse_unless("attention.causal", 1)
    parts: dict[BiasedPart, str] = {"qkv": "attn_q", "o": "attn_output", "mlp": "ffn_down"}
    layer = LayerSpec(
        GatedMlpSpec(keys.count("feed_forward_length")),
        scale=max(head_dim, 1) ** -0.5,
        biases=frozenset(one for one, name in parts.items() if f"blk.0.{name}.bias" in shapes),
    )
    return ArchSpec(
        family=keys.prefix.rstrip("."),
        vocab_size=keys.count("vocab_size", shapes.get("token_embd.weight", (0,))[0]),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=keys.count("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_eps=keys.number("attention.layer_norm_rms_epsilon"),
        max_positions=max_positions,
        rope=_rope(keys, head_dim, max_positions),
        layers=(layer,) * keys.count("block_count", most=MOST_LAYERS),
        is_tied="output.weight" not in shapes,
    )


def read_windowed(keys: ConfigKeys, shapes: Shapes) -> ArchSpec:
    """Read a dense model with one window in all its layers, if any."""
    arch = read_dense(keys, shapes)
    window = keys.count("attention.sliding_window", 0) or None
    return arch.with_layers(arch.layers[0], (window,) * arch.num_layers)


def read_whole_heads(keys: ConfigKeys, shapes: Shapes) -> ArchSpec:
    """Read as `read_windowed`, for families whose heads llama.cpp's converter interleaves."""
    arch = read_windowed(keys, shapes)
    if arch.rope.rotary_dim != arch.head_dim:
        # The converter reorders whole heads, and so the weights are put back.
        raise ArchError(f"{keys.prefix}rope.dimension_count must be {arch.head_dim}")
    return arch


def read_common(arch: ArchSpec, keys: ConfigKeys, metadata: Mapping[str, object]) -> ArchSpec:
    """Add the keys that all families share; refuse a key that no reader knows."""
    if unknown := keys.unread(inert=_INERT):
        raise ArchError(f"{keys.prefix}{unknown[0]} is not supported")
    return replace(arch, eos_token_ids=_eos(metadata), default_dtype=_dtype(metadata))


def _rope(keys: ConfigKeys, head_dim: int, max_positions: int) -> RopeSpec:
    """Read rope; llama3's scaling is the tensor rope_freqs (`model/architectures/rope.py`)."""
    variants: dict[object, RopeVariant] = {"none": "default", "linear": "linear", "yarn": "yarn"}
    found = keys.get("rope.scaling.type")
    kind = "none" if found is None else found
    # A tuple, since the value may not be hashable.
    if kind not in tuple(variants):
        only = ", ".join(map(str, variants))
        raise ArchError(f"rope.scaling.type {shown(kind)} is not supported, only {only}")
    variant = variants[kind]
    factor = keys.number("rope.scaling.factor", 1.0 if variant == "default" else None)
    if variant == "default" and factor not in {0, 1}:
        # Files from before scaling.type had a name for it.
        variant = "linear"
    return RopeSpec(
        theta=keys.number("rope.freq_base", 10000.0),
        rotary_dim=keys.count("rope.dimension_count", head_dim),
        variant=variant,
        factor=factor or 1.0,
        original_max_positions=keys.count("rope.scaling.original_context_length", max_positions),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
    )


def _eos(metadata: Mapping[str, object]) -> tuple[int, ...]:
    """End of text, of turn and of message: each ends an answer."""
    named = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(one for one in named if isinstance(one, int)))


def _dtype(metadata: Mapping[str, object]) -> Dtype:
    kind = metadata.get("general.file_type")
    if kind == _FILE_TYPE_FLOAT32:
        return "float32"
    return "bfloat16" if kind == _FILE_TYPE_BFLOAT16 else "float16"
