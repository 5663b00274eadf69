"""A model with a window on every layer: real keys in pages that are given back and used again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache.kv_cache import KVCache
from cache.view import FULL_VIEW, View
from configs.schema import CacheSection, ModelSection, OctavoConfig, SchedulerSection
from model import build
from model.interface import ModelRunner, SamplingParams
from scheduler.messages import GenerateRequest, Submit
from scheduler.scheduler import Scheduler

_WINDOW, _CHUNK, _PAGE_SIZE = 16, 8, 4
_CONFIG = {
    "model_type": "mistral",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "sliding_window": _WINDOW,
    "initializer_range": 0.5,
}
_BYTES_PER_PAGE = 2 * 2 * 2 * 16 * 4 * _PAGE_SIZE
_SMALL_POOL, _LARGE_POOL = (_WINDOW + _CHUNK) // _PAGE_SIZE + 2, 128
_PROMPT = tuple(i * i % 89 for i in range(150))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelRunner]:
    def make(backend: str, num_pages: int, **changes: Any) -> ModelRunner:
        path: Path = tmp_path_factory.mktemp("tiny") / "config.json"
        path.write_text(json.dumps(_CONFIG | changes))
        return build.make_runner(
            build.resolve_source(f"dummy:{path}"),
            OctavoConfig(
                model=ModelSection(quantization="none", attention_backend=backend, threads=1),  # type: ignore[arg-type] # parsed
                cache=CacheSection(
                    kv_cache_memory=num_pages * _BYTES_PER_PAGE,
                    page_size=_PAGE_SIZE,
                ),
                scheduler=SchedulerSection(max_num_seqs=2, max_num_batched_tokens=_CHUNK),
            ),
        )

    return make


def serve(runner: ModelRunner, num_tokens: int) -> tuple[list[int], set[int], int]:
    """Return the tokens, the pages in the block table, and how many of its entries those are."""
    info = runner.info
    cache = KVCache(info.num_pages, info.page_size, view=info.view, chunk_tokens=_CHUNK)
    section = SchedulerSection(max_num_seqs=2, max_num_batched_tokens=_CHUNK)
    scheduler = Scheduler(cache, section, info)
    params = SamplingParams(num_tokens, temperature=0.0, ignore_eos=True)
    assert scheduler.submit(Submit(0, GenerateRequest(_PROMPT, params))) == []
    tokens, table = list[int](), list[int]()
    while plan := scheduler.plan():
        [table] = plan.step.page_ids
        tokens += scheduler.apply(plan, runner.launch(plan.step).wait()).token_ids
        scheduler.check()
    return tokens, set(table), len(table)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_a_small_pool_gives_the_tokens_of_a_large_one(
    make: Callable[..., ModelRunner], backend: str
) -> None:
    small, large = make(backend, _SMALL_POOL), make(backend, _LARGE_POOL)
    assert small.info.view == View(window=_WINDOW)
    assert small.info.max_model_len == 512
    expected, _, _ = serve(large, 100)
    tokens, pages, num_entries = serve(small, 100)
    assert tokens == expected
    # Nearly all of them were used again and again.
    assert len(pages) <= _SMALL_POOL < num_entries // 5


def test_the_view_is_that_of_the_widest_layer(make: Callable[..., ModelRunner]) -> None:
    qwen = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
    assert make("torch", 64, **qwen, max_window_layers=0).info.view == View(window=8)
    assert make("torch", 64, **qwen, max_window_layers=1).info.view == FULL_VIEW
    assert make("torch", 64, sliding_window=None).info.view == FULL_VIEW


def test_a_pool_below_the_window_bounds_the_length(make: Callable[..., ModelRunner]) -> None:
    assert make("torch", 4).info.max_model_len == 16
