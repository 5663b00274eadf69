"""Reads the keys of a config.json that families share, as `transformers` reads them.

The same file must give the same logits there and here, so defaults and the preference between two
keys are that library's. An unsupported option that would change the arithmetic is an error that
names its key; an unknown key is kept in `unknown_keys` for the operator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast, get_args

from model.architectures.arch import (
    MOST_LAYERS,
    ArchError,
    ArchSpec,
    BadValueError,
    BiasedPart,
    ConfigKeys,
    Dtype,
    GatedMlpSpec,
    LayerSpec,
    RopeSpec,
    RopeVariant,
)
from model.architectures.quantization import read_quantization
from model.formats.json_file import shown

#: Keys of config.json without effect on inference.
_INERT = frozenset(
    # A table of words reads best as one text.
    """_name_or_path architectures attention_dropout attn_implementation auto_map bos_token_id
    initializer_range is_llama_config pad_token_id pretraining_tp transformers.js_config
    transformers_version use_cache sep_token_id unsloth_fixed unsloth_version id2label label2id
    return_dict chunk_size_feed_forward problem_type""".split()  # noqa: SIM905 - see above
)

#: Keys that change the arithmetic in some family, with the values that do not.
_ARITHMETIC: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("configuration_files", "decoder", "fusion_config", "generator"), ()),
    **dict.fromkeys(("per_layer_config", "text_config", "text_encoder"), ()),
    **dict.fromkeys(("transformers_weights", "no_rope_layers"), ()),
    **dict.fromkeys(("attention_multiplier", "attn_logit_softcapping"), ()),
    **dict.fromkeys(("final_logit_softcapping", "attention_chunk_size"), ()),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier"), (1.0,)),
    **dict.fromkeys(("logits_scaling", "logit_scale"), (1.0,)),
    **dict.fromkeys(("num_experts", "num_local_experts", "mlp_only_layers"), (0, [])),
    "is_encoder_decoder": (0,),
    "rope_interleaved": (0,),
    "hidden_act": ("silu", "swish"),
}


def read_dense(
    keys: ConfigKeys,
    *,
    max_positions: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    rms_eps: float = 1e-6,
    is_tied: bool = False,
    biases: frozenset[BiasedPart] = frozenset(),
) -> ArchSpec:
    """Read the keys that dense families share, into layers like Llama's.

    All arguments but `biases` are the values that `transformers` takes for absent keys; None:
    derived.
    """
    hidden_size, num_heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    head_dim = keys.count("head_dim", head_dim or hidden_size // max(num_heads, 1))
    max_positions = keys.count("max_position_embeddings", max_positions)
    # A key that is null, as opposed to absent, means as many as heads.
    if "num_key_value_heads" in keys or num_kv_heads is None:
        num_kv_heads = num_heads
    mlp = GatedMlpSpec(keys.count("intermediate_size"))
    layer = LayerSpec(mlp, scale=max(head_dim, 1) ** -0.5, biases=biases)
    return ArchSpec(
        family=str(keys.get("model_type")),
        vocab_size=keys.count("vocab_size"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=keys.count("num_key_value_heads", num_kv_heads),
        head_dim=head_dim,
        rms_eps=keys.number("rms_norm_eps", rms_eps),
        max_positions=max_positions,
        rope=_rope(keys, head_dim, max_positions),
        layers=(layer,) * keys.count("num_hidden_layers", most=MOST_LAYERS),
        is_tied=keys.flag("tie_word_embeddings", default=is_tied),
    )


def read_common(
    arch: ArchSpec, keys: ConfigKeys, generation_config: Mapping[str, object]
) -> ArchSpec:
    """Add the keys that all families share; refuse unsupported keys that were not read."""
    quantization = read_quantization(keys)
    for key, harmless in _ARITHMETIC.items():
        if key not in keys.read:
            keys.refuse_unless(key, *harmless)
    if "is_causal" in keys and keys.get("is_causal") is not True:
        raise ArchError("is_causal must be true where it is there")
    return replace(
        arch,
        eos_token_ids=_eos_token_ids(keys, generation_config),
        default_dtype=_dtype(keys),
        quantization=quantization,
        notes=_notes(keys, arch.family),
        unknown_keys=keys.unread(inert=_INERT),
    )


def _notes(keys: ConfigKeys, family: str) -> tuple[str, ...]:
    words = "".join(word.capitalize() for word in family.split("_"))
    expected, named = f"{words}ForCausalLM", keys.get("architectures")
    if not named or named == [expected]:
        return ()
    return (f"read as {expected} after its model_type {family!r}, though architectures is {named}",)


def _dtype(keys: ConfigKeys) -> Dtype:
    # Both are read: newer files have dtype, older ones torch_dtype.
    dtype, torch_dtype = keys.get("dtype"), keys.get("torch_dtype")
    found = dtype or torch_dtype or "float32"
    # "auto" is the dtype of the weights, in which they are read anyway.
    found = "float32" if found == "auto" else found
    if found not in get_args(Dtype):
        raise ArchError(f"dtype {shown(found)} is not supported, only {', '.join(get_args(Dtype))}")
    return cast("Dtype", found)


def _eos_token_ids(keys: ConfigKeys, generation_config: Mapping[str, object]) -> tuple[int, ...]:
    where, found = "", keys.get("eos_token_id")
    if (generated := generation_config.get("eos_token_id")) is not None:
        where, found = "generation_config.json: ", generated
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(one) is int for one in ids):
        raise BadValueError(
            f"{where}eos_token_id must be a number or a list of them, got {shown(found)}"
        )
    return tuple(ids)


def attention_biases(keys: ConfigKeys) -> frozenset[BiasedPart]:
    """Read `attention_bias`: whether q, k, v and o have one."""
    return frozenset({"qkv", "o"}) if keys.flag("attention_bias") else frozenset()


def window_size(keys: ConfigKeys) -> int | None:
    """Read `sliding_window`: null means none, an absent key the default of `transformers`."""
    is_null = "sliding_window" in keys and keys.get("sliding_window") is None
    return None if is_null else keys.count("sliding_window", 4096)


def windows_by_type(
    keys: ConfigKeys, window: int | None, default: Sequence[int | None]
) -> tuple[int | None, ...]:
    """Read each layer's window from `layer_types`; `default` where the key is absent."""
    types, num_layers = keys.get("layer_types"), len(default)
    if types is None:
        return tuple(default)
    if not isinstance(types, list) or len(types) != num_layers:
        raise ArchError(f"layer_types must list {num_layers} layers, got {shown(types)}")
    kinds = {"full_attention": None, "sliding_attention": window}
    # A tuple, since a value of the list may not be hashable.
    if unknown := [kind for kind in types if kind not in tuple(kinds)]:
        raise ArchError(
            f"layer_types: {shown(unknown[0])} is not supported, only {', '.join(kinds)}"
        )
    if window is None and "sliding_attention" in types:
        raise ArchError("layer_types: 'sliding_attention' needs a sliding_window that is used")
    return tuple(kinds[kind] for kind in types)


#: The keys of each rope variant besides those of all variants.
_ROPE_KEYS: dict[RopeVariant, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "beta_fast", "beta_slow", "attention_factor"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
}


def _rope(keys: ConfigKeys, head_dim: int, max_positions: int) -> RopeSpec:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
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
    given = {key for key, value in values.items() if value is not None}
    if unknown := sorted(given - known):
        raise ArchError(
            f"rope_parameters: {shown(unknown[0])} is not supported with rope_type {variant!r}"
        )
    # transformers rotates whole heads of these families, whatever the factor, or fails.
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
        # transformers counts from there, whatever other keys are set.
        spec = replace(spec, original_max_positions=max_positions)
    if min(spec.theta, spec.factor, spec.original_max_positions) <= 0:
        raise ArchError("rope_parameters: numbers must be above 0")
    if spec.low_freq_factor >= spec.high_freq_factor:
        raise ArchError("rope_parameters: low_freq_factor must be below high_freq_factor")
    return spec


def _rope_values(keys: ConfigKeys) -> dict[str, object]:
    """Join the keys of rope from several places."""
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
