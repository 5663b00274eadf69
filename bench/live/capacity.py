"""How many tokens and sequences fit into the same memory, by format of keys and values.

`python bench/live/capacity.py [--kv bfloat16,int8,int4] [--memory 2GiB] [--requests 64]`: starts
a server for each format, one after the other, and sends it all requests at once, with random
prompts that share nothing. Prints for each the tokens that its pages hold, the largest and the mean
number of sequences that ran at once, preemptions, and finished requests a second. A format ends
after `--limit-s` at the latest, with the requests that were finished by then. Asserts nothing.
"""

# ruff: noqa: T201 - a benchmark's only purpose is to print

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from loadtest.answer import Answer
from loadtest.launch import Command, started
from loadtest.target import Target, TargetError

_START_TIMEOUT_S = 300.0
_POLL_S = 0.5
#: Of the default model's vocabulary, tokens that are text.
_TOKEN_IDS = range(1000, 40_000)


@dataclass(slots=True)
class Watched:
    """The metrics of a server while it is under load."""

    #: At each poll, how many sequences were in the batch.
    running: list[float] = field(default_factory=list)
    newest: dict[str, float] = field(default_factory=dict)

    async def poll(self, target: Target) -> None:
        """Read the metrics until cancelled."""
        while True:
            self.newest = await _metrics(target)
            self.running.append(self.newest["octavo_num_requests_running"])
            await asyncio.sleep(_POLL_S)


async def _metrics(target: Target) -> dict[str, float]:
    """Return the metrics without labels of their own."""
    status, page = await target.get("/metrics")
    if status != 200:
        raise TargetError(f"{target.url}/metrics answers {status}")
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.labels.keys() <= {"model_name"}
    }


async def _request(target: Target, model: str, arguments: Any, seed: int) -> bool:
    """Send one request; return whether its answer came whole."""
    rng = random.Random(seed)
    body = {
        "model": model,
        "prompt": rng.choices(_TOKEN_IDS, k=arguments.tokens - arguments.output_tokens),
        "max_tokens": arguments.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    outcome = await target.stream("/v1/completions", body, arguments.limit_s, Answer())
    return outcome.failure is None


async def _measure(arguments: Any, kv_format: str) -> None:
    command = Command.parse(
        f"{sys.executable} -m server serve {arguments.model} --port {{port}}"
        f" --kv-cache-dtype {kv_format} --kv-cache-memory {arguments.memory}"
        f" --max-num-seqs {arguments.requests} {arguments.flags}"
    )
    log = Path(tempfile.gettempdir()) / f"octavo-capacity-{kv_format}.log"
    async with started(kv_format, command, "", log, _START_TIMEOUT_S) as server:
        [model] = await server.target.models()
        watched = Watched()
        polling = asyncio.create_task(watched.poll(server.target))
        began_s = time.perf_counter()
        finished = sum(
            await asyncio.gather(
                *(
                    _request(server.target, model, arguments, seed)
                    for seed in range(arguments.requests)
                )
            )
        )
        taken_s = time.perf_counter() - began_s
        polling.cancel()
        metrics = await _metrics(server.target)
    busy = [count for count in watched.running if count]
    print(
        f"{kv_format:9} {metrics['octavo_kv_tokens_capacity']:9.0f} tokens in {arguments.memory}"
        f"  at once {max(busy, default=0):.0f}, mean {sum(busy) / max(1, len(busy)):.1f}"
        f"  preemptions {metrics['octavo_num_preemptions_total']:.0f}"
        f"  finished {finished} of {arguments.requests} in {taken_s:.1f} s:"
        f" {finished / taken_s:.3f} a second",
        flush=True,
    )


async def _main(arguments: Any) -> None:
    for _ in range(arguments.rounds):
        for kv_format in arguments.kv.split(","):
            try:
                await _measure(arguments, kv_format)
            except TargetError as error:
                print(f"{kv_format:9} not measured: {error}", flush=True)


def main() -> None:
    """Print a line for each format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--kv", default="bfloat16,int8,int4", help="formats, by commas")
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4000, help="of prompt and answer together")
    parser.add_argument("--output-tokens", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1, help="all formats in turn, this often")
    parser.add_argument("--limit-s", type=float, default=600.0, help="for the load on one format")
    parser.add_argument("--flags", default="", help="further flags of the server")
    asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
