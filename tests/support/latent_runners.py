"""A tiny model with latent attention and experts, in runners with any number of pages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from configs.schema import CacheSection, ModelSection, OctavoConfig, SchedulerSection
from model import build
from model.interface import Vocabulary
from model.runner import TorchRunner

_CONFIG = {
    "model_type": "deepseek_v3",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 16,
    "v_head_dim": 8,
    # The second layer has experts.
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}
#: A latent vector and a rotated one in each layer, in float32.
_BYTES_PER_TOKEN = 2 * (32 + 16) * 4


def latent_runners(
    folder: Path, page_size: int, vocabulary: Vocabulary
) -> Iterator[Callable[[int], TorchRunner]]:
    """Yield a function from a number of pages to a runner; all have the same weights."""
    path = folder / "config.json"
    path.write_text(json.dumps(_CONFIG))
    source = build.resolve_source(f"dummy:{path}")
    runners: dict[int, TorchRunner] = {}

    def make(num_pages: int) -> TorchRunner:
        if num_pages not in runners:
            memory = num_pages * page_size * _BYTES_PER_TOKEN
            runner = build.make_runner(
                source,
                OctavoConfig(
                    model=ModelSection(quantization="none", threads=1),
                    cache=CacheSection(kv_cache_memory=memory, page_size=page_size),
                    scheduler=SchedulerSection(max_num_seqs=6, max_num_batched_tokens=64),
                ),
            )
            assert runner.info.num_pages == num_pages
            runner.set_vocabulary(vocabulary)
            runners[num_pages] = runner
        return runners[num_pages]

    yield make
    for runner in runners.values():
        runner.close()
