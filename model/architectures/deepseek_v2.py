"""DeepSeek-V2: multi-head latent attention, and experts that are chosen by softmax.

Queries and keys of the checkpoints rotate neighbours. Not read from GGUF, where it is `deepseek2`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from model.architectures import arch_hf
from model.architectures.arch import (
    ArchError,
    ArchSpec,
    BiasedPart,
    ConfigKeys,
    Family,
    GatedMlpSpec,
    LatentSpec,
    LayerSpec,
    MixtureSpec,
    RouterSpec,
    TensorSpec,
)

#: Four times those of any model. A file's sizes bound loops.
MOST_EXPERTS = 1024
#: Of training, of speculation, and of groups where there are none.
_INERT = (
    *("aux_loss_alpha", "seq_aux", "ep_size", "output_router_logits", "router_aux_loss_coef"),
    *("num_nextn_predict_layers", "num_mtp_layers", "n_group", "topk_group"),
)


def _read_hf(keys: ConfigKeys) -> ArchSpec:
    keys.refuse_unless("scoring_func", "softmax")
    # `transformers` takes no notice of it.
    keys.get("norm_topk_prob")
    keys.refuse_unless("topk_method", "greedy", "group_limited_greedy")
    has_groups = keys.get("topk_method") == "group_limited_greedy"
    router = RouterSpec(
        scores="softmax",
        num_experts=stated_count(keys, "n_routed_experts", 64, most=MOST_EXPERTS),
        num_chosen=keys.count("num_experts_per_tok"),
        num_groups=keys.count("n_group") if has_groups else 1,
        num_chosen_groups=keys.count("topk_group") if has_groups else 1,
        factor=keys.number("routed_scaling_factor", 1.0),
    )
    mixture = MixtureSpec(
        router,
        intermediate_size=stated_count(keys, "moe_intermediate_size", 1407),
        num_shared=stated_count(keys, "n_shared_experts", 2),
    )
    biases: frozenset[BiasedPart] = frozenset({"mlp"} if keys.flag("mlp_bias") else ())
    return read_latent(keys, mixture, max_positions=2048, num_dense_layers=0, biases=biases)


def read_latent(
    keys: ConfigKeys,
    mixture: MixtureSpec,
    *,
    max_positions: int,
    num_dense_layers: int,
    num_kv_heads: int | None = None,
    is_interleaved: bool = True,
    biases: frozenset[BiasedPart] = frozenset(),
) -> ArchSpec:
    """Read attention and layers, the later ones with this mixture.

    The three numbers are the values that `transformers` takes for absent keys.
    """
    latent = LatentSpec(
        rank=stated_count(keys, "kv_lora_rank", 512),
        query_rank=_query_rank(keys),
        plain_dim=stated_count(keys, "qk_nope_head_dim", 128),
        rotary_dim=stated_count(keys, "qk_rope_head_dim", 64),
        value_dim=stated_count(keys, "v_head_dim", 128),
        is_interleaved=is_interleaved,
    )
    head_dim = latent.plain_dim + latent.rotary_dim
    # `transformers` computes these two, and does not read them.
    keys.refuse_unless("head_dim", latent.rotary_dim)
    keys.refuse_unless("qk_head_dim", head_dim)
    keys.refuse_unless("attention_bias", 0)
    keys.refuse_unless("moe_layer_freq", 1)
    for key in _INERT:
        keys.get(key)
    arch = arch_hf.read_dense(
        keys,
        max_positions=max_positions,
        num_kv_heads=num_kv_heads,
        head_dim=latent.rotary_dim,
        biases=biases,
    )
    if arch.num_kv_heads != arch.num_heads:
        raise ArchError(
            f"num_key_value_heads must be num_attention_heads {arch.num_heads}, "
            f"got {arch.num_kv_heads}"
        )
    # The factor on cosines and sines is for the rotated part alone; this one is for whole scores.
    magnitude = arch.rope.magnitude(arch.rope.mscale_all_dim or 0.0)
    dense = replace(arch.layers[0], scale=head_dim**-0.5 * magnitude**2)
    first = stated_count(keys, "first_k_dense_replace", num_dense_layers)
    first = min(max(first, 0), arch.num_layers)
    rest = (replace(dense, mlp=mixture),) * (arch.num_layers - first)
    return replace(
        arch,
        num_kv_heads=1,
        head_dim=latent.rank + latent.rotary_dim,
        layers=(*(dense,) * first, *rest),
        latent=latent,
    )


def stated_count(keys: ConfigKeys, key: str, default: int, *, most: int = 2**31 - 1) -> int:
    """Return a whole number; `default` where the key is absent, for null is none here."""
    if key in keys and keys.get(key) is None:
        raise ArchError(f"{key} must not be null")
    return keys.count(key, default, most=most)


def _query_rank(keys: ConfigKeys) -> int | None:
    """Read `q_lora_rank`: null means none, an absent key the default of `transformers`."""
    is_null = "q_lora_rank" in keys and keys.get("q_lora_rank") is None
    return None if is_null else keys.count("q_lora_rank", 1536)


def layer_tensors(arch: ArchSpec, layer: LayerSpec) -> Iterator[TensorSpec]:
    """Declare latent attention, norms, and a gated MLP or a mixture."""
    latent, hidden, heads = arch.latent, arch.hidden_size, arch.num_heads
    assert latent is not None, "see read_latent"
    queries = heads * (latent.plain_dim + latent.rotary_dim)
    ups = heads * (latent.plain_dim + latent.value_dim)
    if latent.query_rank is None:
        yield _tensor("self_attn.q_proj.weight", "qkv", queries, hidden)
    else:
        yield _tensor("self_attn.q_a_proj.weight", "qkv", latent.query_rank, hidden)
        yield _tensor("self_attn.q_a_layernorm.weight", "q_norm", latent.query_rank)
        yield _tensor("self_attn.q_b_proj.weight", "q_up", queries, latent.query_rank)
    yield _tensor("self_attn.kv_a_proj_with_mqa.weight", "qkv", arch.head_dim, hidden)
    yield _tensor("self_attn.kv_a_layernorm.weight", "k_norm", latent.rank)
    yield _tensor("self_attn.kv_b_proj.weight", "kv_up", ups, latent.rank)
    yield _tensor("self_attn.o_proj.weight", "o", hidden, heads * latent.value_dim)
    yield _tensor("input_layernorm.weight", "attention_input", hidden)
    yield _tensor("post_attention_layernorm.weight", "mlp_input", hidden)
    has_biases = "mlp" in layer.biases
    if isinstance(layer.mlp, GatedMlpSpec):
        yield from _gated_mlp("mlp", "", hidden, layer.mlp.intermediate_size, has_biases=has_biases)
    else:
        yield from _mixture(layer.mlp, hidden, has_biases=has_biases)


def _mixture(mixture: MixtureSpec, hidden: int, *, has_biases: bool) -> Iterator[TensorSpec]:
    router, inner = mixture.router, mixture.intermediate_size
    yield _tensor("mlp.gate.weight", "router", router.num_experts, hidden)
    if router.has_bias:
        yield _tensor("mlp.gate.e_score_correction_bias", "router_bias", router.num_experts)
    shared = inner * mixture.num_shared
    yield from _gated_mlp("mlp.shared_experts", "", hidden, shared, has_biases=has_biases)
    for expert in range(router.num_experts):
        yield from _gated_mlp(f"mlp.experts.{expert}", f"experts.{expert}.", hidden, inner)


def _gated_mlp(
    name: str, target: str, hidden: int, inner: int, *, has_biases: bool = False
) -> Iterator[TensorSpec]:
    for part, product, shape in (
        ("gate_proj", "gate_up", (inner, hidden)),
        ("up_proj", "gate_up", (inner, hidden)),
        ("down_proj", "down", (hidden, inner)),
    ):
        yield _tensor(f"{name}.{part}.weight", target + product, *shape)
        if has_biases:
            yield _tensor(f"{name}.{part}.bias", target + product, shape[0])


def _tensor(name: str, target: str, *shape: int) -> TensorSpec:
    # It has no name in GGUF.
    return TensorSpec(name, "", shape, target)


FAMILY = Family(_read_hf, None, layer_tensors)
