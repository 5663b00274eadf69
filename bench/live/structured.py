"""Tokens per second with and without a schema, and how grammars disturb others. Needs a server.

`python bench/live/structured.py [URL]`. Eight streams decode side by side, freely and by a
schema, in turns. Then seven streams decode freely, first alone, then beside costly grammars and
new ones that have to be compiled; the gaps between their tokens are compared. Asserts nothing.
"""

# ruff: noqa: T201 - a benchmark's only purpose is to print

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import httpx

_NUM_STREAMS = 8
_NUM_TOKENS = 200
_ROUNDS = 4
_MESSAGES = [{"role": "user", "content": "Tell me about ten people of a small town."}]
#: So long that no answer comes to its end before `_NUM_TOKENS`.
_SCHEMA = json.loads((Path(__file__).parents[2] / "tests" / "data" / "people.json").read_text())
_COSTLY = {"guided_regex": r"(?s:.*)a(.|\n){500}"}

Moments = list[float]
_numbers = count()


async def _stream(client: httpx.AsyncClient, body: dict[str, Any]) -> Moments:
    payload = {"messages": _MESSAGES, "max_tokens": _NUM_TOKENS, "stream": True, **body}
    moments: Moments = []
    async with client.stream("POST", "/v1/chat/completions", json=payload) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                moments.append(time.perf_counter())
            if '"error"' in line:
                print(line[:200])
    return moments


async def _rate(client: httpx.AsyncClient, body: dict[str, Any]) -> float:
    streams = (_stream(client, {**body, "seed": i}) for i in range(_NUM_STREAMS))
    moments = await asyncio.gather(*streams)
    spent_s = max(own[-1] for own in moments) - min(own[0] for own in moments)
    return sum(map(len, moments)) / spent_s


async def _gaps(client: httpx.AsyncClient, beside: Callable[[], Awaitable[None]] | None) -> str:
    free = {"ignore_eos": True}
    streams = [
        asyncio.create_task(_stream(client, {**free, "seed": i})) for i in range(_NUM_STREAMS - 1)
    ]
    disturbing = None if beside is None else asyncio.ensure_future(beside())
    moments = await asyncio.gather(*streams)
    if disturbing is not None:
        disturbing.cancel()
    gaps = sorted((b - a) * 1e3 for own in moments for a, b in pairwise(own[5:]))
    high = gaps[int(len(gaps) * 0.99)]
    return f"median {statistics.median(gaps):.1f} ms, p99 {high:.1f} ms, worst {gaps[-1]:.1f} ms"


async def _repeat(client: httpx.AsyncClient, body: Callable[[], dict[str, Any]]) -> None:
    while True:
        await _stream(client, body())


def _new_schema() -> dict[str, Any]:
    """Return a schema that is not cached yet: 2,000 values to compile, a few tokens to write."""
    number = next(_numbers)
    values = [f"value {number} {i}" for i in range(2000)]
    return {"guided_json": {"enum": values}, "max_tokens": 1}


async def _measure(url: str) -> None:
    schema = {"guided_json": _SCHEMA}
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        await _rate(client, {})
        await _rate(client, schema)
        rates: dict[str, list[float]] = {"free": [], "schema": []}
        for _ in range(_ROUNDS):
            rates["free"].append(await _rate(client, {"ignore_eos": True}))
            rates["schema"].append(await _rate(client, schema))
        free, held = (statistics.median(own) for own in rates.values())
        print(f"{_NUM_STREAMS} streams: free {free:.1f} tokens/s, by a schema {held:.1f}")
        print(f"that is {held / free:.3f} of it")
        print(f"seven alone:            {await _gaps(client, None)}")
        plain = await _gaps(client, lambda: _repeat(client, lambda: {"ignore_eos": True}))
        print(f"beside a free one:      {plain}")
        same = await _gaps(client, lambda: _repeat(client, lambda: schema))
        print(f"beside one by a schema: {same}")
        costly = await _gaps(client, lambda: _repeat(client, lambda: _COSTLY))
        print(f"beside a costly one:    {costly}")
        compiled = await _gaps(client, lambda: _repeat(client, _new_schema))
        print(f"beside new schemas:     {compiled}")


if __name__ == "__main__":
    asyncio.run(_measure(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"))
