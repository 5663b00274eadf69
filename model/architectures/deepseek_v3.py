"""DeepSeek-V3: as V2, with experts chosen by sigmoids, a bias for each expert and groups."""

from __future__ import annotations

from model.architectures.arch import ArchSpec, ConfigKeys, Family, MixtureSpec, RouterSpec
from model.architectures.deepseek_v2 import (
    MOST_EXPERTS,
    layer_tensors,
    read_latent,
    stated_count,
)


def _read_hf(keys: ConfigKeys) -> ArchSpec:
    keys.refuse_unless("scoring_func", "sigmoid")
    keys.refuse_unless("topk_method", "noaux_tc")
    router = RouterSpec(
        scores="sigmoid",
        num_experts=stated_count(keys, "n_routed_experts", 256, most=MOST_EXPERTS),
        num_chosen=stated_count(keys, "num_experts_per_tok", 8),
        num_groups=stated_count(keys, "n_group", 8),
        num_chosen_groups=stated_count(keys, "topk_group", 4),
        num_group_scores=2,
        has_bias=True,
        # Null is false.
        is_normalized=keys.flag("norm_topk_prob", default="norm_topk_prob" not in keys),
        factor=keys.number("routed_scaling_factor", 2.5),
    )
    mixture = MixtureSpec(
        router,
        intermediate_size=stated_count(keys, "moe_intermediate_size", 2048),
        num_shared=stated_count(keys, "n_shared_experts", 1),
    )
    return read_latent(
        keys,
        mixture,
        max_positions=4096,
        num_dense_layers=3,
        num_kv_heads=128,
        # Likewise.
        is_interleaved=keys.flag("rope_interleave", default="rope_interleave" not in keys),
    )


FAMILY = Family(_read_hf, None, layer_tensors)
