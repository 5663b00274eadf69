"""From a GGUF's metadata, as llama.cpp's converter writes it, to an `ArchSpec`.

What the metadata leaves out (biases, tied embeddings, the vocabulary's size) shows in which
tensors the file has. A key of the architecture that nobody here knows is an error: every one of
them changes the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping

from model.architectures.arch import (
    FAMILIES,
    MOST_LAYERS,
    ArchError,
    ArchSpec,
    ConfigKeys,
    Dtype,
    RopeSpec,
    RopeVariant,
)
from model.formats.json_file import shown
from model.gguf_file import GgufFile

#: general.file_type of a file that is mostly of one 16-bit type, or of float32.
_FILE_TYPE_FLOAT32, _FILE_TYPE_BFLOAT16 = 0, 32

_INERT = frozenset({"tensor_data_layout", "rope.scaling.finetuned", "expert_used_count"})


def from_gguf(file: GgufFile) -> ArchSpec:
    """Read the architecture off a GGUF file. Raises `ArchError`."""
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    return from_gguf_metadata(file.metadata, shapes)


def from_gguf_metadata(
    metadata: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]
) -> ArchSpec:
    """Read the metadata and the tensors' shapes (outermost first). Raises `ArchError`."""
    family = metadata.get("general.architecture")
    if family not in FAMILIES:
        raise ArchError(
            f"general.architecture {shown(family)} is not supported, only {', '.join(FAMILIES)}"
        )
    assert isinstance(family, str)
    own = {key: value for key, value in metadata.items() if key.startswith(f"{family}.")}
    keys = ConfigKeys(own, prefix=f"{family}.")
    hidden_size, num_heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", hidden_size // max(num_heads, 1))
    num_layers = keys.count("block_count", most=MOST_LAYERS)
    max_positions = keys.count("context_length")
    keys.refuse_unless("attention.value_length", head_dim)
    keys.refuse_unless("expert_count", 0)
    keys.refuse_unless("attention.causal", 1)
    window = keys.count("attention.sliding_window", 0) or None
    spec = ArchSpec(
        family=family,
        vocab_size=_vocab_size(keys, shapes),
        hidden_size=hidden_size,
        intermediate_size=keys.count("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=keys.count("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_eps=keys.number("attention.layer_norm_rms_epsilon"),
        max_positions=max_positions,
        rope=_rope(keys, head_dim, max_positions),
        windows=(window,) * num_layers,
        eos_token_ids=_eos(metadata),
        is_tied="output.weight" not in shapes,
        has_qkv_bias="blk.0.attn_q.bias" in shapes,
        has_o_bias="blk.0.attn_output.bias" in shapes,
        has_mlp_bias="blk.0.ffn_down.bias" in shapes,
        has_qk_norm="blk.0.attn_q_norm.weight" in shapes,
        default_dtype=_dtype(metadata),
    )
    if family in {"llama", "mistral"} and spec.rope.rotary_dim != head_dim:
        # The converter reorders whole heads for this family, and so the weights are put back.
        raise ArchError(f"{family}.rope.dimension_count must be {head_dim}")
    if unknown := keys.unread(inert=_INERT):
        raise ArchError(f"{family}.{unknown[0]} is not supported")
    return spec


def _vocab_size(keys: ConfigKeys, shapes: Mapping[str, tuple[int, ...]]) -> int:
    rows = shapes.get("token_embd.weight", (0,))[0]
    return keys.count("vocab_size", rows)


def _rope(keys: ConfigKeys, head_dim: int, max_positions: int) -> RopeSpec:
    """llama3's stretching is no key but a tensor, rope_freqs: see `model/architectures/rope.py`."""
    variants: dict[object, RopeVariant] = {"none": "default", "linear": "linear", "yarn": "yarn"}
    found = keys.get("rope.scaling.type")
    kind = "none" if found is None else found
    # A tuple: what stands there need not be hashable.
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
