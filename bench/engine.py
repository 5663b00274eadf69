"""The engine without HTTP: the cost of a step with 1, 8 and 32 sequences, and of a prompt alone.

`python bench/engine.py [--model smollm2] [--rows 1 8 32] [--quantization auto]`: the real
model behind the real scheduler, in this process. Prints; asserts nothing.
"""

# ruff: noqa: T201 - printing is all a benchmark is for

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.schema import ModelSection, OctavoConfig, SchedulerSection
from model import build
from model.interface import SamplingParams
from scheduler.engine import Engine
from scheduler.messages import GenerateRequest, Prepared, StepResult, Submit


def _no_grammars(_message: Prepared) -> None:
    raise AssertionError("nothing here is prepared beside the steps")


class Bench:
    """An engine, and words that are not in its cache."""

    def __init__(self, config: OctavoConfig) -> None:
        self._runner = build.make_runner(build.resolve_source(config.model.model), config)
        self._engine = Engine(self._runner, config.scheduler, time.monotonic, _no_grammars)
        self._rng = random.Random(0)
        self._num_requests = 0

    @property
    def about(self) -> str:
        info = self._runner.info
        return (
            f"{info.name}, {info.quantization} weights, {info.kv_cache_dtype} cache, "
            f"attention {info.attention_backend} on {info.device}"
        )

    def submit(self, prompt_tokens: int, max_tokens: int) -> None:
        vocab_size = self._runner.info.vocab_size
        prompt = tuple(self._rng.randrange(vocab_size) for _ in range(prompt_tokens))
        params = SamplingParams(max_tokens, temperature=0.0, ignore_eos=True)
        self._engine.handle(Submit(self._num_requests, GenerateRequest(prompt, params)))
        self._num_requests += 1

    def step(self) -> tuple[float, StepResult]:
        """Compute one step and return its time."""
        began_s = time.perf_counter()
        result = self._engine.step()
        return time.perf_counter() - began_s, result

    def drain(self) -> float:
        """Compute all that is left and return the time."""
        began_s = time.perf_counter()
        while self._engine.has_work:
            self._engine.step()
        return time.perf_counter() - began_s

    def close(self) -> None:
        self._engine.check()
        self._engine.close()


def decode_s(bench: Bench, rows: int, prompt_tokens: int, steps: int) -> list[float]:
    """Return the times of the steps in which all rows, and nothing else, got one token."""
    for _ in range(rows):
        bench.submit(prompt_tokens, 2 * steps)
    taken_s: list[float] = []
    while len(taken_s) < steps:
        step_s, result = bench.step()
        if result.num_step_tokens == rows == len(result.token_ids):
            taken_s.append(step_s)
    bench.drain()
    return taken_s


def main() -> None:
    """Print the tables."""
    args = _arguments()
    config = OctavoConfig(
        model=ModelSection(model=args.model, quantization=args.quantization, threads=args.threads),
        scheduler=SchedulerSection(
            max_num_seqs=max(args.rows), max_num_batched_tokens=8192, speculation="none"
        ),
    )
    bench = Bench(config)
    print(bench.about)
    print(f"decode, {args.prompt_tokens} tokens before it")
    print("rows   median ms      p90 ms   tokens/s")
    for rows in args.rows:
        taken_s = decode_s(bench, rows, args.prompt_tokens, args.steps)
        median_s, p90_s = statistics.median(taken_s), statistics.quantiles(taken_s, n=10)[-1]
        print(f"{rows:4} {median_s * 1e3:11.2f} {p90_s * 1e3:11.2f} {rows / median_s:10.1f}")
    print("one prompt, until its first token")
    print("tokens   best ms   tokens/s")
    for num_tokens in args.prompts:
        best_s = min(_prompt_s(bench, num_tokens) for _ in range(5))
        print(f"{num_tokens:6} {best_s * 1e3:9.1f} {num_tokens / best_s:10.0f}")
    bench.close()


def _prompt_s(bench: Bench, num_tokens: int) -> float:
    bench.submit(num_tokens, 1)
    return bench.drain()


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--threads", type=int, help="default: one for each core")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=168)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 1800])
    parser.add_argument("--steps", type=int, default=64)
    return parser.parse_args()


if __name__ == "__main__":
    main()
