"""Bounded sequences on the real model: `python bench/long_streams.py [--policy sinks:4+1020]`.

Prints the perplexity of a text by position: with all keys, under the policy, and under a window
alone. Then streams grow far beyond their window, in a pool that holds little more; prints the time
of a step by their length. Times are CPU time of one thread, so other programs disturb them less.
"""

# ruff: noqa: T201 - printing is all a benchmark is for

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cache.view import FULL_VIEW, View
from configs.kv_policy import parse_kv_policy
from configs.schema import CacheSection, ModelSection, OctavoConfig, SchedulerSection
from model import build
from model.interface import SamplingParams, TokenLogprobs
from scheduler.engine import Engine
from scheduler.messages import GenerateRequest, Prepared, Submit
from server.text.load import load_text
from server.text.prose import PROSE

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
CHUNK_TOKENS = 128


def _no_grammars(_message: Prepared) -> None:
    raise AssertionError("nothing here is prepared beside the steps")


def _engine(model: str, num_pool_tokens: int, num_streams: int) -> tuple[Engine, int]:
    """Return an engine whose pool holds so many tokens, and its page size."""
    bytes_per_token = _bytes_per_token(model)
    config = OctavoConfig(
        model=ModelSection(model=model, threads=1),
        cache=CacheSection(kv_cache_memory=num_pool_tokens * bytes_per_token),
        scheduler=SchedulerSection(
            max_num_seqs=num_streams,
            max_num_batched_tokens=max(CHUNK_TOKENS, num_streams),
            speculation="none",
        ),
    )
    runner = build.make_runner(build.resolve_source(model), config)
    return Engine(runner, config.scheduler, time.monotonic, _no_grammars), runner.info.page_size


def _bytes_per_token(model: str) -> int:
    section = ModelSection(model=model, threads=1, max_model_len=64)
    runner = build.make_runner(build.resolve_source(model), OctavoConfig(model=section))
    num_bytes = runner.info.kv_bytes_per_token
    runner.close()
    return num_bytes


def grow(model: str, view: View, words: list[int], num_streams: int, num_tokens: int) -> None:
    """Print the CPU time of a step by the length of the streams, and the pages they hold."""
    num_pool_tokens = num_streams * ((view.max_keys or num_tokens) + CHUNK_TOKENS + 64)
    engine, page_size = _engine(model, num_pool_tokens, num_streams)
    params = SamplingParams(num_tokens, temperature=0.8, ignore_eos=True)
    for index in range(num_streams):
        prompt = tuple(words[50 * index : 50 * index + 50])
        engine.handle(Submit(index, GenerateRequest(prompt, params, view=view)))
    steps_s: list[float] = []
    most_pages = 0
    while engine.has_work:
        began_s = time.thread_time()
        result = engine.step()
        if len(result.token_ids) == num_streams:
            steps_s.append(time.thread_time() - began_s)
        cache = result.stats.cache
        most_pages = max(most_pages, cache.pages_private + cache.pages_leased)
    stats = engine.stats()
    print(
        f"{num_streams} streams x {num_tokens} tokens, pool of {num_pool_tokens} tokens:"
        f" at most {most_pages * page_size} held,"
        f" {stats.scheduler.preemptions_total} preemptions"
    )
    for first in range(0, len(steps_s), 1000):
        part_ms = [1000 * one for one in steps_s[first : first + 1000]]
        best, median = statistics.quantiles(part_ms, n=20)[0], statistics.median(part_ms)
        print(f"  from token {first:6}: step {median:6.2f} ms, fastest 5 % {best:6.2f} ms")
    engine.close()


def perplexities(model: str, views: dict[str, View], words: list[int], part: int) -> None:
    """Print the perplexity of a text by position under each view."""
    engine, _ = _engine(model, len(words) + 1024, 1)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    for number, (name, view) in enumerate(views.items()):
        request = GenerateRequest(tuple(words), params, view=view)
        engine.handle(Submit(number, request))
        scores: list[TokenLogprobs] = []
        while engine.has_work:
            for _, entries in engine.step().prompt_logprobs:
                scores += entries
        parts = [scores[at : at + part] for at in range(0, len(scores), part)]
        found = [math.exp(-sum(s.logprob for s in own) / len(own)) for own in parts]
        print(f"{name:14}", " ".join(f"{one:8.1f}" for one in found), flush=True)
    engine.close()


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--policy", default="sinks:4+1020")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--text-tokens", type=int, default=6000)
    asked = parser.parse_args()
    policy = parse_kv_policy(asked.policy)
    view = View(policy.sinks, policy.window)
    tokenizer = load_text(build.resolve_source(asked.model).path).tokenizer
    text = PROSE + "\n".join(page.read_text() for page in PAGES)
    words = tokenizer.encode(text, add_special_tokens=False)[: max(asked.text_tokens, 1000)]
    views = {
        "full": FULL_VIEW,
        asked.policy: view,
        "window alone": View(window=view.max_keys),
    }
    print("perplexity of each 1,000 tokens of a text:")
    perplexities(asked.model, views, words[: asked.text_tokens], 1000)
    grow(asked.model, view, words, asked.streams, asked.tokens)


if __name__ == "__main__":
    main()
