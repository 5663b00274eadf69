"""Every family of `transformers`: served as it is there, or refused in a line. Minutes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from model.arch import ArchError
from model.hf import load_hf_decoder
from model.source import ModelSource

#: Under all the names that sizes have; a family takes no notice of the others'.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "dff"), 80),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 96),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 16),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "qk_rope_head_dim": 8,
    "hidden_size_per_layer_input": 16,
    "sliding_window": 8,
    "is_decoder": True,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}
_NARROW = {"head_dim": 16}
_CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash"), _LATENT
    ),
    **dict.fromkeys(("minicpm3", "youtu"), _LATENT),
    **dict.fromkeys(("helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), _NARROW),
    "gemma3n_text": {"num_kv_shared_layers": 1},
}
#: Of those that can be had on the hub, the ones an operator is likeliest to bring.
_POPULAR = set(
    """apertus arcee bitnet cohere cohere2 deepseek_v2 deepseek_v3 ernie4_5 exaone4 gemma gemma2
    gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_oss granite
    granitemoe helium hunyuan_v1_dense llama minicpm3 ministral3 mistral mixtral olmo olmo2 olmo3
    olmoe opt phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 starcoder2""".split()  # noqa: SIM905 - reads best as one text
)


@pytest.mark.slow
def test_every_family_is_served_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    served, refused = set(), {}
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        path.write_text(json.dumps({"model_type": family, **_SIZES, **_CHANGES.get(family, {})}))
        try:
            load_hf_decoder(
                ModelSource("dummy", path, family), dtype=torch.float32, device=torch.device("cpu")
            )
            served.add(family)
        except ArchError as error:
            refused[family] = str(error)
    assert served >= _POPULAR, {one: refused[one] for one in sorted(_POPULAR - served)}
    for family, reason in refused.items():
        assert reason.startswith(f"model_type '{family}': "), reason
    print(f"{len(served)} served: {', '.join(sorted(served))}")  # noqa: T201 - what one runs it for
    print(*sorted(refused.values()), sep="\n")  # noqa: T201 - likewise
