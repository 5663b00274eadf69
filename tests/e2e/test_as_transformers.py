"""Greedy tokens and prompt logprobs of the real model equal those of transformers in float32.

In one file, so that one process alone loads transformers' decoder.
"""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from configs.schema import CacheSection, ModelSection, OctavoConfig, SchedulerSection
from model import build
from model.interface import SamplingParams
from scheduler.client import EngineStats, GenerateRequest
from scheduler.process import ProcessClient
from server.text.load import load_text
from waiting import TIMEOUT_S

pytestmark = pytest.mark.e2e

_NUM_TOKENS = 64
#: The sample of the fast half: enough to outgrow a pool, and one prompt of each kind alone.
_NUM_SAMPLE_TOKENS, _SAMPLE_STEP = 32, 16
_RECORD = Path(__file__).parent / "data" / "greedy.json"
_PAGE_BYTES = 2 * 30 * 3 * 64 * 4 * 16
_PROMPT = (
    "The atlases stand on the lowest shelf, for they are heavy. Ask the librarian for the key of "
    "the glass case. Le café est fermé le dimanche; 東京 is 9,500 km away, and 2 + 2 = 4."
)

Prompts = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def prompts(smollm2_file: Path) -> Prompts:
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
def expected(prompts: Prompts, *, is_whole: bool) -> list[list[int]]:
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
    prompts: Prompts,
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
    rounds: list[tuple[Prompts, int]], num_tokens: int, *, num_pages: int = 2048
) -> tuple[list[list[list[int]]], EngineStats]:
    """Return each round's tokens from an engine process without quantisation, and its stats.

    A round has prompts and their number at once. The cache is warm if the round before had as many.
    """
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
            tokens, before = [], 0
            for prompts, at_once in rounds:
                if at_once != before:
                    await client.reset_cache()
                gate, before = asyncio.Semaphore(at_once), at_once
                asked = (_tokens(client, gate, prompt, num_tokens) for prompt in prompts)
                tokens.append(await asyncio.gather(*asked))
            return tokens, client.stats()
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


def test_alone_and_sixteen_at_a_time_cold_and_warm(
    prompts: Prompts, expected: list[list[int]], *, is_whole: bool
) -> None:
    step = 1 if is_whole else _SAMPLE_STEP
    alone, crowd = slice(0, None, step), slice(0, None, min(step, 2))
    rounds = [(prompts[alone], 1)] * 2 + [(prompts[crowd], 16)] * 2
    tokens, stats = _serve(rounds, len(expected[0]))
    assert tokens == [expected[alone]] * 2 + [expected[crowd]] * 2
    # In each second round everything but each prompt's last token was cached.
    cached = sum(len(prompt) - 1 for prompt in prompts[alone] + prompts[crowd])
    assert stats.scheduler.prefix_hits_tokens_total >= cached


def test_all_at_once_in_a_pool_for_six(prompts: Prompts, expected: list[list[int]]) -> None:
    num_tokens = len(expected[0])
    longest = max(map(len, prompts)) + num_tokens
    tokens, stats = _serve([(prompts, 32)], num_tokens, num_pages=6 * -(-longest // 16))
    assert tokens == [expected]
    assert stats.scheduler.preemptions_total > 0
    cache = stats.cache
    assert cache.pages_private == cache.pages_leased == 0
    assert cache.pages_free + cache.pages_cached == cache.pages_total


@pytest.fixture(scope="module")
def reference(transformers_model: Any) -> Callable[[list[int]], torch.Tensor]:
    """The natural-log probabilities of transformers for the token after each of these."""

    def logprobs(token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = transformers_model(torch.tensor([token_ids])).logits[0]
        return logits.log_softmax(-1)

    return logprobs


def test_a_prompts_logprobs_are_those_of_transformers(
    start_daemon: Callable[..., Any], reference: Callable[[list[int]], torch.Tensor]
) -> None:
    asked = {"prompt": _PROMPT, "echo": True, "logprobs": 5, "prompt_logprobs": 5}
    # In float32, a few tokens of the prompt at a time.
    flags = ("--quantization", "none", "--max-num-batched-tokens", "24", "--max-num-seqs", "8")
    with start_daemon(*flags) as daemon:
        body = {**asked, "max_tokens": 0, "return_token_ids": True}
        answer = httpx.post(f"{daemon.url}/v1/completions", json=body, timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    token_ids = choice["prompt_token_ids"]
    expected = reference(token_ids)
    told = choice["logprobs"]["token_logprobs"]
    assert told[0] is choice["prompt_logprobs"][0] is None
    assert told[1:] == pytest.approx(
        [expected[i, token].item() for i, token in enumerate(token_ids[1:])], abs=1e-3
    )
    for i, (candidates, token) in enumerate(
        zip(choice["prompt_logprobs"][1:], token_ids[1:], strict=True)
    ):
        own = candidates[str(token)]
        assert own["logprob"] == told[i + 1]
        assert own["rank"] == 1 + int((expected[i] > expected[i, token]).sum())
        for token_id, one in candidates.items():
            assert one["logprob"] == pytest.approx(expected[i, int(token_id)].item(), abs=1e-3)
    text, offsets = choice["text"], choice["logprobs"]["text_offset"]
    assert text == _PROMPT
    for token, start in zip(choice["logprobs"]["tokens"], offsets, strict=True):
        assert token.startswith("bytes:") or text.startswith(token, start)
