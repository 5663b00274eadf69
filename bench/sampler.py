"""Time the sampler: `python -m bench.sampler`. Prints microseconds a step; asserts nothing.

Logits are Zipf's law over a shuffled vocabulary, about as sharp as a small language model's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch

from model.interface import SamplingParams, SlotStart
from model.sampling.sampler import Sampler

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "min_p 0.05": {"min_p": 0.05},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
    "penalties, greedy": {"temperature": 0.0, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    "min_tokens, greedy": {"temperature": 0.0, "min_tokens": 1000},
    "64 bad words, greedy": {
        "temperature": 0.0,
        "bad_words": tuple((5, 7, 11 + i)[i % 3 :] for i in range(64)),
    },
    "100 allowed, greedy": {"temperature": 0.0, "allowed_token_ids": tuple(range(100))},
    "logprobs 5, greedy": {"temperature": 0.0, "logprobs": 5},
}


def zipf_logits(rows: int, vocab_size: int, exponent: float, device: torch.device) -> torch.Tensor:
    """Return `[rows, vocab]` logits whose probabilities fall with the rank's power."""
    by_rank = -exponent * torch.arange(1, vocab_size + 1).log()
    order = torch.stack([torch.randperm(vocab_size) for _ in range(rows)])
    return by_rank[order].to(device)


def time_step_us(sampler: Sampler, logits: torch.Tensor, num_steps: int) -> float:
    """Return the median time of a step."""
    slots = list(range(len(logits)))
    taken_s = []
    for position in range(num_steps):
        fresh = logits.clone()
        began = time.perf_counter()
        sampler.sample(fresh, slots, [position] * len(slots))
        taken_s.append(time.perf_counter() - began)
    return statistics.median(taken_s) * 1e6


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--exponent", type=float, default=1.5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    sys.stdout.write(f"{'µs a step':24}" + "".join(f"{rows:>7} rows" for rows in args.rows) + "\n")
    for name, extras in CASES.items():
        cells = []
        for rows in args.rows:
            sampler = Sampler(rows, args.vocab_size, (0,), device)
            for slot in range(rows):
                params = SamplingParams(1000, seed=slot, **extras)
                sampler.start(SlotStart(slot, params, range(200)))
            logits = zipf_logits(rows, args.vocab_size, args.exponent, device)
            cells.append(time_step_us(sampler, logits, args.steps))
        sys.stdout.write(f"{name:24}" + "".join(f"{cell:12,.0f}" for cell in cells) + "\n")


if __name__ == "__main__":
    main()
