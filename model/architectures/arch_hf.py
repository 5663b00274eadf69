"""From a config.json, as `transformers` reads it, to an `ArchSpec`.

The same file must give the same logits there and here: what that library takes where a key is
absent or null, and which of two keys it prefers, is taken here too. An option that would change the
arithmetic and is not supported is an error that names its key; a key nobody here knows is kept in
`unknown_keys`, to be told to the operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast, get_args

from model.architectures.arch import (
    FAMILIES,
    MOST_LAYERS,
    ArchError,
    ArchSpec,
    BadValueError,
    ConfigKeys,
    Dtype,
    RopeSpec,
    RopeVariant,
)
from model.formats.json_file import shown

#: Keys of config.json that have no say in inference.
_INERT = frozenset(
    # A table of words reads best as one text.
    """_name_or_path architectures attention_dropout attn_implementation auto_map bos_token_id
    initializer_range is_llama_config pad_token_id pretraining_tp transformers.js_config
    transformers_version use_cache sep_token_id unsloth_fixed unsloth_version id2label label2id
    return_dict chunk_size_feed_forward problem_type""".split()  # noqa: SIM905 - see above
)

#: What `transformers` takes where config.json says nothing.
_HF_DEFAULT_MAX_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_HF_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
#: Keys that every config of `transformers` acts on, whatever its family.
_ANY_FAMILY = (
    "configuration_files",
    "decoder",
    "fusion_config",
    "generator",
    "per_layer_config",
    "text_config",
    "text_encoder",
    "transformers_weights",
)


def from_hf_config(
    config: Mapping[str, object], generation_config: Mapping[str, object] | None = None
) -> ArchSpec:
    """Read a config.json, and the generation_config.json beside it for its end-of-sequence ids."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ArchError(f"model_type {shown(family)} is not supported, only {', '.join(FAMILIES)}")
    assert isinstance(family, str)
    keys = ConfigKeys(config)
    keys.get("model_type")
    _refuse_hf(keys)
    hidden_size, num_heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    default_head_dim = 128 if family == "qwen3" else hidden_size // max(num_heads, 1)
    head_dim = keys.count("head_dim", default_head_dim)
    max_positions = keys.count("max_position_embeddings", _HF_DEFAULT_MAX_POSITIONS[family])
    # Qwen2's bias and Mistral's lack of one are no options.
    has_bias = keys.flag("attention_bias") if family in {"llama", "qwen3"} else family == "qwen2"
    num_layers = keys.count("num_hidden_layers", most=MOST_LAYERS)
    return ArchSpec(
        family=family,
        vocab_size=keys.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=keys.count("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(keys, family, num_heads),
        head_dim=head_dim,
        rms_eps=keys.number("rms_norm_eps", 1e-6),
        max_positions=max_positions,
        rope=_hf_rope(keys, head_dim, max_positions),
        windows=_hf_windows(keys, family, num_layers),
        eos_token_ids=_token_ids(
            ("generation_config.json: ", (generation_config or {}).get("eos_token_id")),
            ("", keys.get("eos_token_id")),
        ),
        is_tied=keys.flag("tie_word_embeddings"),
        has_qkv_bias=has_bias,
        has_o_bias=has_bias and family != "qwen2",
        has_mlp_bias=family == "llama" and keys.flag("mlp_bias"),
        has_qk_norm=family == "qwen3",
        default_dtype=_hf_dtype(keys),
        unknown_keys=keys.unread(inert=_INERT),
        notes=_notes(config, family),
    )


def _notes(config: Mapping[str, object], family: str) -> tuple[str, ...]:
    expected, named = f"{family.capitalize()}ForCausalLM", config.get("architectures")
    if not named or named == [expected]:
        return ()
    return (f"read as {expected} after its model_type {family!r}, though architectures is {named}",)


def _num_kv_heads(keys: ConfigKeys, family: str, num_heads: int) -> int:
    """Tell a key that is absent from one that is null, which is as many as heads."""
    is_null = "num_key_value_heads" in keys
    default = num_heads if is_null else _HF_DEFAULT_KV_HEADS.get(family, num_heads)
    return keys.count("num_key_value_heads", default)


def _refuse_hf(keys: ConfigKeys) -> None:
    for key in _ANY_FAMILY:
        keys.refuse_unless(key)
    keys.refuse_unless("is_encoder_decoder", 0)
    if "is_causal" in keys and keys.get("is_causal") is not True:
        raise ArchError("is_causal must be true where it is there")
    keys.refuse_unless("hidden_act", "silu", "swish")
    keys.refuse_unless("rope_interleaved", 0)
    keys.refuse_unless("quantization_config")
    keys.refuse_unless("no_rope_layers")
    keys.refuse_unless("attention_chunk_size")
    for key in ("num_experts", "num_local_experts", "mlp_only_layers"):
        keys.refuse_unless(key, 0, [])
    for key in ("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"):
        keys.refuse_unless(key, 1.0)
    for key in ("attention_multiplier", "attn_logit_softcapping", "final_logit_softcapping"):
        keys.refuse_unless(key)


def _hf_dtype(keys: ConfigKeys) -> Dtype:
    # Both are read: newer files say dtype, older ones torch_dtype.
    dtype, torch_dtype = keys.get("dtype"), keys.get("torch_dtype")
    found = dtype or torch_dtype or "float32"
    # As the weights have it; either way they are read in whatever they are saved in.
    found = "float32" if found == "auto" else found
    if found not in get_args(Dtype):
        raise ArchError(f"dtype {shown(found)} is not supported, only {', '.join(get_args(Dtype))}")
    return cast("Dtype", found)


def _token_ids(*candidates: tuple[str, object]) -> tuple[int, ...]:
    """Return the first candidate that says something, a number or a list of them."""
    for where, found in candidates:
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(one) is int for one in ids):
            raise BadValueError(
                f"{where}eos_token_id must be a number or a list of them, got {shown(found)}"
            )
        return tuple(ids)
    return ()


def _hf_windows(keys: ConfigKeys, family: str, num_layers: int) -> tuple[int | None, ...]:
    if family == "llama":
        return (None,) * num_layers
    # Present and null means none; absent means what transformers takes.
    is_null = "sliding_window" in keys and keys.get("sliding_window") is None
    window = None if is_null else keys.count("sliding_window", 4096)
    if family == "mistral":
        if "layer_types" in keys:
            raise ArchError("layer_types is not supported with model_type 'mistral'")
        return (window,) * num_layers
    first = keys.count("max_window_layers", 28)
    if not keys.flag("use_sliding_window"):
        window = None
    types = keys.get("layer_types")
    if types is None:
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if not isinstance(types, list) or len(types) != num_layers:
        raise ArchError(f"layer_types must list {num_layers} layers, got {shown(types)}")
    kinds = {"full_attention": None, "sliding_attention": window}
    # A tuple: what stands there need not be hashable.
    if unknown := [kind for kind in types if kind not in tuple(kinds)]:
        raise ArchError(
            f"layer_types: {shown(unknown[0])} is not supported, only {', '.join(kinds)}"
        )
    if window is None and "sliding_attention" in types:
        raise ArchError("layer_types: 'sliding_attention' needs a sliding_window that is used")
    return tuple(kinds[kind] for kind in types)


#: Which keys a rope variant reads, apart from rope_theta.
_ROPE_KEYS: dict[RopeVariant, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


def _hf_rope(keys: ConfigKeys, head_dim: int, max_positions: int) -> RopeSpec:
    """`rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    values = _rope_values(keys)
    rope = ConfigKeys(values)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    variant = next((one for one in _ROPE_KEYS if one == rope_type), None)
    if variant is None:
        raise ArchError(
            f"rope_type {shown(rope_type)} is not supported, only {', '.join(_ROPE_KEYS)}"
        )
    known = {*_ROPE_KEYS[variant], "rope_theta", "rope_type", "type", "partial_rotary_factor"}
    known.add("original_max_position_embeddings")
    said = {key for key, value in values.items() if value is not None}
    if unknown := sorted(said - known):
        raise ArchError(
            f"rope_parameters: {shown(unknown[0])} is not supported with rope_type {variant!r}"
        )
    # transformers has these families turn whole heads, whatever the factor, or cannot run them.
    rope.refuse_unless("partial_rotary_factor", 1.0)
    spec = RopeSpec(
        theta=rope.number("rope_theta", 10000.0),
        rotary_dim=head_dim,
        variant=variant,
        factor=rope.number("factor", 1.0 if variant == "default" else None),
        original_max_positions=rope.count("original_max_position_embeddings", max_positions),
        low_freq_factor=rope.number("low_freq_factor", None if variant == "llama3" else 1.0),
        high_freq_factor=rope.number("high_freq_factor", None if variant == "llama3" else 4.0),
        # Zero is as good as absent.
        beta_fast=rope.number("beta_fast", 32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0) or 1.0,
        attention_factor=rope.maybe_number("attention_factor"),
        mscale=rope.maybe_number("mscale"),
        mscale_all_dim=rope.maybe_number("mscale_all_dim"),
        # Null is false.
        truncate=rope.flag("truncate", default="truncate" not in rope),
    )
    if variant == "dynamic":
        if head_dim <= 2:
            raise ArchError(f"rope_type 'dynamic' needs heads wider than {head_dim}")
        # transformers counts from there, whatever else is said.
        spec = replace(spec, original_max_positions=max_positions)
    if min(spec.theta, spec.factor, spec.original_max_positions) <= 0:
        raise ArchError("rope_parameters: numbers must be above 0")
    if spec.low_freq_factor >= spec.high_freq_factor:
        raise ArchError("rope_parameters: low_freq_factor must be below high_freq_factor")
    return spec


def _rope_values(keys: ConfigKeys) -> dict[str, object]:
    """Join what is said of rope in several places."""
    values: dict[str, object] = {}
    for key in ("rope_parameters", "rope_scaling"):
        found = keys.get(key)
        if not isinstance(found, dict | None):
            raise ArchError(f"{key} must be an object, got {shown(found)}")
        if values and found:
            raise ArchError("rope_scaling beside rope_parameters is not supported")
        values |= found or {}
    for key in ("rope_theta", "partial_rotary_factor"):
        values.setdefault(key, keys.get(key))
    # Wins over the one in the object.
    if (original := keys.get("original_max_position_embeddings")) is not None:
        values["original_max_position_embeddings"] = original
    return values
