"""The loss by llama-server's own formats of keys and values, over HTTP.

`python bench/live/llama_kv.py LLAMA_SERVER MODEL.gguf [--types f16 q8_0 q4_0] [--tokens 512]`, with
the tokenizer of MODEL. It has no log-probabilities of a prompt, so each prefix of the text is a
request for one token with the whole vocabulary. The first type is the reference of the others.
Prints the perplexity of the built-in prose, and the KL divergence from the reference.
"""

# ruff: noqa: T201 - a benchmark's only purpose is to print

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from loadtest.launch import Command, started
from server.text.load import load_text
from server.text.prose import prose_token_ids

_START_TIMEOUT_S = 120.0


async def _logprobs(client: httpx.AsyncClient, prefix: list[int], vocab_size: int) -> np.ndarray:
    body = {"prompt": prefix, "n_predict": 1, "n_probs": vocab_size, "cache_prompt": True}
    answer = await client.post("/completion", content=orjson.dumps(body))
    answer.raise_for_status()
    [place] = orjson.loads(answer.content)["completion_probabilities"]
    found = np.full(vocab_size, -np.inf)
    for entry in place["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


async def _measure(arguments: Any, cache_type: str, token_ids: list[int]) -> np.ndarray:
    """Return `[tokens - 1, vocabulary]`: log-probabilities after each token but the last."""
    command = Command.parse(
        f"{arguments.server} -m {arguments.model} --port {{port}} -c {len(token_ids) + 16} -np 1"
        f" -fa on -ctk {cache_type} -ctv {cache_type} --threads {arguments.threads}"
    )
    vocab_size = load_text(Path(arguments.model)).tokenizer.vocab_size
    log = Path(tempfile.gettempdir()) / "octavo-llama-kv.log"
    async with (
        started(cache_type, command, "", log, _START_TIMEOUT_S) as server,
        httpx.AsyncClient(base_url=server.target.url, timeout=60) as client,
    ):
        rows = [
            await _logprobs(client, token_ids[:count], vocab_size)
            for count in range(1, len(token_ids))
        ]
    return np.stack(rows)


async def _main(arguments: Any) -> None:
    tokenizer = load_text(Path(arguments.model)).tokenizer
    token_ids = list(prose_token_ids(tokenizer))[: arguments.tokens]
    exact: np.ndarray | None = None
    for cache_type in arguments.types:
        found = await _measure(arguments, cache_type, token_ids)
        exact = found if exact is None else exact
        loss = -found[np.arange(len(found)), token_ids[1:]].mean()
        divergence = (np.exp(exact) * (exact - found)).sum(-1).mean()
        same = (found.argmax(-1) == exact.argmax(-1)).mean()
        print(
            f"{cache_type:5} perplexity {math.exp(loss):.3f} over {len(found)} tokens"
            f"  KL {divergence:.1e}  same likeliest token {same:.2%}",
            flush=True,
        )


def main() -> None:
    """Print a line for each type."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server")
    parser.add_argument("model")
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q4_0"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
