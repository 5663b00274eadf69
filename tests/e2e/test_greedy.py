"""Greedy tokens of the real model equal transformers' float32, whatever the circumstances."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import CacheSection, ModelSection, OctavoConfig, SchedulerSection
from model import build
from model.interface import SamplingParams
from scheduler.client import EngineStats, GenerateRequest
from scheduler.process import ProcessClient
from server.text.load import load_text

pytestmark = pytest.mark.e2e

_NUM_TOKENS = 64
#: The sample of the fast half: enough to outgrow a pool, and one prompt of each kind alone.
_NUM_SAMPLE_TOKENS, _SAMPLE_STEP = 32, 16
_RECORD = Path(__file__).parent / "data" / "greedy.json"
_PAGE_BYTES = 2 * 30 * 3 * 64 * 4 * 16


@pytest.fixture(scope="module")
def prompts(smollm2_file: Path) -> list[tuple[int, ...]]:
    texts = json.loads((Path(__file__).parent / "data" / "prompts.json").read_text())
    text = load_text(smollm2_file)
    assert text.template is not None
    chats = [text.template.render([{"role": "user", "content": one}]) for one in texts[::2]]
    return [
        tuple(text.tokenizer.encode(one, add_special_tokens=False))
        for one in [*chats, *texts[1::2]]
    ]


@pytest.fixture(
    scope="module",
    params=[False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["a sample", "the whole record"],
)
def is_whole(request: pytest.FixtureRequest) -> bool:
    """Whether all is compared that was recorded."""
    answer: bool = request.param
    return answer


@pytest.fixture(scope="module")
def expected(prompts: list[tuple[int, ...]], *, is_whole: bool) -> list[list[int]]:
    """The recorded tokens of transformers for them; a test below checks the record itself."""
    recorded = json.loads(_RECORD.read_text())
    assert [tuple(one["prompt"]) for one in recorded] == prompts, "record anew: see _record"
    num_tokens = _NUM_TOKENS if is_whole else _NUM_SAMPLE_TOKENS
    return [one["tokens"][:num_tokens] for one in recorded]


def _generate(model: Any, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """Return the tokens of transformers' own decoder."""
    token_ids = torch.tensor([prompt])
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # transformers' own deprecations are not ours to mend.
        output = model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    generated: list[int] = output[0, len(prompt) :].tolist()
    return generated


def test_the_record_is_what_transformers_gives(
    transformers_model: Any,
    prompts: list[tuple[int, ...]],
    request: pytest.FixtureRequest,
    *,
    is_whole: bool,
) -> None:
    step, num_tokens = (1, _NUM_TOKENS) if is_whole else (_SAMPLE_STEP, _NUM_SAMPLE_TOKENS)
    tokens = [_generate(transformers_model, prompt, num_tokens) for prompt in prompts[::step]]
    if request.config.getoption("--record"):
        assert is_whole, "recording needs --record -m slow"
        both = zip(prompts, tokens, strict=True)
        _RECORD.write_text(json.dumps([{"prompt": p, "tokens": t} for p, t in both]))
    expected: list[list[int]] = request.getfixturevalue("expected")
    assert tokens == expected[::step]


def _serve(
    prompts: list[tuple[int, ...]],
    num_tokens: int,
    *,
    at_once: int,
    num_rounds: int = 1,
    num_pages: int = 2048,
) -> tuple[list[list[list[int]]], EngineStats]:
    """Return each round's tokens from an engine process without quantisation, and its stats."""
    config = OctavoConfig(
        model=ModelSection(quantization="none"),
        cache=CacheSection(kv_cache_memory=num_pages * _PAGE_BYTES, page_size=16),
        scheduler=SchedulerSection(max_num_seqs=32, max_num_batched_tokens=256, debug=True),
    )

    async def run() -> tuple[list[list[list[int]]], EngineStats]:
        source = build.resolve_source("smollm2")
        client = ProcessClient(partial(build.make_runner, source, config), config.scheduler)
        await client.start()
        try:
            gate = asyncio.Semaphore(at_once)
            rounds = [
                await asyncio.gather(*(_tokens(client, gate, p, num_tokens) for p in prompts))
                for _ in range(num_rounds)
            ]
            return rounds, client.stats()
        finally:
            await client.close()

    return asyncio.run(run())


def _tokens(
    client: ProcessClient, gate: asyncio.Semaphore, prompt: tuple[int, ...], num_tokens: int
) -> Coroutine[Any, Any, list[int]]:
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)

    async def collect() -> list[int]:
        async with gate:
            request = GenerateRequest(prompt, params)
            return [t async for delta in client.generate(request) for t in delta.token_ids]

    return collect()


def test_alone_cold_and_warm(
    prompts: list[tuple[int, ...]], expected: list[list[int]], *, is_whole: bool
) -> None:
    step = 1 if is_whole else _SAMPLE_STEP
    prompts, expected = prompts[::step], expected[::step]
    rounds, stats = _serve(prompts, len(expected[0]), at_once=1, num_rounds=2)
    assert rounds[0] == expected
    assert rounds[1] == expected
    # In the second round everything but each prompt's last token was cached.
    assert stats.scheduler.prefix_hits_tokens_total >= sum(len(prompt) - 1 for prompt in prompts)


def test_sixteen_at_a_time_cold_and_warm(
    prompts: list[tuple[int, ...]], expected: list[list[int]]
) -> None:
    rounds, _ = _serve(prompts, len(expected[0]), at_once=16, num_rounds=2)
    assert rounds[0] == expected
    assert rounds[1] == expected


def test_all_at_once_in_a_pool_for_six(
    prompts: list[tuple[int, ...]], expected: list[list[int]]
) -> None:
    num_tokens = len(expected[0])
    longest = max(map(len, prompts)) + num_tokens
    rounds, stats = _serve(prompts, num_tokens, at_once=32, num_pages=6 * -(-longest // 16))
    assert rounds[0] == expected
    assert stats.scheduler.preemptions_total > 0
    cache = stats.cache
    assert cache.pages_private == cache.pages_leased == 0
    assert cache.pages_free + cache.pages_cached == cache.pages_total
