"""A tiny model like Gemma 2, with windowed and other layers, in runners with any memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cache.groups import GroupedCache
from configs.schema import CacheSection, ModelSection, OctavoConfig, SchedulerSection
from model import build
from model.interface import Vocabulary
from model.runner import TorchRunner
from scheduler.caches import build_cache

WINDOW = 16
_CONFIG = {
    "model_type": "gemma2",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    # Backends that read pages in place have no caps.
    "attn_logit_softcapping": None,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "initializer_range": 0.5,
}
#: Of a token in one layer, in float32.
LAYER_BYTES = 2 * 2 * 16 * 4


def mixed_runner(
    folder: Path,
    backend: str,
    kv_cache_memory: int,
    *,
    page_size: int = 4,
    max_num_seqs: int = 6,
    max_num_batched_tokens: int = 64,
    config: dict[str, Any] | None = None,
    quantization: str = "none",
    has_draft: bool = False,
    **cache: Any,
) -> TorchRunner:
    """Return a runner on the weights of a folder; `config` changes the model.

    `has_draft`: it is its own draft model.
    """
    path = folder / "config.json"
    path.write_text(json.dumps(_CONFIG | {"max_position_embeddings": 64} | (config or {})))
    source = build.resolve_source(f"dummy:{path}")
    return build.make_runner(
        source,
        OctavoConfig(
            model=ModelSection(
                quantization=quantization,  # type: ignore[arg-type] # parsed
                attention_backend=backend,  # type: ignore[arg-type] # parsed
                threads=1,
                weights_cache="off",
            ),
            cache=CacheSection(kv_cache_memory=kv_cache_memory, page_size=page_size, **cache),
            scheduler=SchedulerSection(
                max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
            ),
        ),
        draft_source=source if has_draft else None,
    )


def grouped_cache(runner: TorchRunner, chunk_tokens: int) -> GroupedCache:
    """Return the cache of its two groups."""
    section = SchedulerSection(max_num_seqs=1, max_num_batched_tokens=chunk_tokens)
    cache = build_cache(runner.info, section)
    assert isinstance(cache, GroupedCache)
    return cache


def mixed_runners(
    folder: Path,
    page_size: int,
    vocabulary: Vocabulary,
    *,
    backend: str,
    overlapped: Callable[[TorchRunner, int], TorchRunner] | None = None,
) -> Iterator[Callable[[int], TorchRunner]]:
    """Yield a function from a number of pages of all layers to a runner, all with the same weights.

    `overlapped`: makes two steps overlap.
    """
    runners: dict[int, TorchRunner] = {}

    def make(num_pages: int) -> TorchRunner:
        if num_pages not in runners:
            memory = num_pages * page_size * 3 * LAYER_BYTES
            config = {"sliding_window": 6}
            runner = mixed_runner(folder, backend, memory, page_size=page_size, config=config)
            assert runner.info.windowed is not None
            runners[num_pages] = overlapped(runner, 6) if overlapped else runner
            runners[num_pages].set_vocabulary(vocabulary)
        return runners[num_pages]

    yield make
    for runner in runners.values():
        runner.close()
