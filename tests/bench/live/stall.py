"""How long streams wait while a long prompt is computed beside them. Needs a running server.

`python tests/bench/live/stall.py [URL]`: eight streams decode; once all of them flow, one prompt of
4,000 tokens arrives. Prints each stream's median and worst gap between tokens. Asserts nothing.
"""

# ruff: noqa: T201 - a benchmark's only purpose is to print

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from itertools import pairwise

import httpx

_NUM_STREAMS = 8
_NUM_TOKENS = 300
_LONG_PROMPT_TOKENS = 4000
_WAIT_TOKENS = 40


async def _stream(
    client: httpx.AsyncClient, prompt: list[int], max_tokens: int, flows: asyncio.Semaphore
) -> list[float]:
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    moments: list[float] = []
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                moments.append(time.perf_counter())
                if len(moments) == _WAIT_TOKENS:
                    flows.release()
    return moments


async def _measure(url: str) -> None:
    flows = asyncio.Semaphore(0)
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        streams = [
            asyncio.create_task(
                _stream(client, list(range(100 * i, 100 * i + 50)), _NUM_TOKENS, flows)
            )
            for i in range(1, _NUM_STREAMS + 1)
        ]
        for _ in streams:
            await flows.acquire()
        began = time.perf_counter()
        long = [1000 + i % 7919 for i in range(_LONG_PROMPT_TOKENS)]
        first = (await _stream(client, long, 1, flows))[0] - began
        ratios = [_report(await stream, began, began + first) for stream in streams]
    print(f"long prompt: first token after {first:.2f} s")
    print(f"worst gap over median gap: {max(ratios):.2f}")


def _report(moments: list[float], began: float, ended: float) -> float:
    gaps = [after - before for before, after in pairwise(moments)]
    beside = [gap for gap, at in zip(gaps, moments[1:], strict=False) if began <= at <= ended]
    median, worst = statistics.median(gaps), max(gaps)
    print(
        f"median gap {median * 1e3:6.1f} ms, beside the prompt "
        f"{statistics.median(beside or [0.0]) * 1e3:6.1f} ms ({len(beside)} tokens), "
        f"worst {worst * 1e3:6.1f} ms = {worst / median:.2f} x the median"
    )
    return worst / median


if __name__ == "__main__":
    asyncio.run(_measure(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"))
