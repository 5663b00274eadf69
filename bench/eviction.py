"""Policies of eviction on traces of prompts, without a model: `python bench/eviction.py`.

The cache is the real one; a request is admitted, committed and freed. Prints for each traffic and
policy the share of prompt tokens found, and of the work saved where the price of a token rises
with the keys before it. Prints; asserts nothing.
"""

# ruff: noqa: T201 - printing is all a benchmark is for

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cache.kv_cache import KVCache
from cache.policy import POLICIES, CostAware, EvictionPolicy, policy_of

PAGE_TOKENS = 16
#: Keys before a token at which attention costs as much as all else, in an 8B model.
_TOKENS_OF_DOUBLE_PRICE = 32_768
_ANSWER_TOKENS = 128

#: A prompt with its answer, and the length of the prompt alone.
Request = tuple[list[int], int]
Traffic = Callable[[random.Random], Iterator[Request]]


class Texts:
    """Texts of random tokens; equal names give equal texts."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._named: dict[str, list[int]] = {}

    def new(self, num_tokens: int) -> list[int]:
        """Return a text that no other request has."""
        return [self._chance.getrandbits(31) for _ in range(num_tokens)]

    def named(self, name: str, num_tokens: int) -> list[int]:
        """Return the text of a name."""
        if name not in self._named:
            self._named[name] = self.new(num_tokens)
        return self._named[name]


def with_answer(texts: Texts, prompt: list[int]) -> Request:
    """Return a request with an answer of a fixed length."""
    return prompt + texts.new(_ANSWER_TOKENS), len(prompt)


def tenants(chance: random.Random) -> Iterator[Request]:
    """Yield questions behind the system prompts of 60 tenants, whose popularity is Zipf's."""
    texts, names = Texts(chance), range(60)
    weights = [1 / (rank + 1) for rank in names]
    while True:
        [tenant] = chance.choices(names, weights)
        system = texts.named(f"system {tenant}", 500 + 40 * tenant)
        yield with_answer(texts, system + texts.new(chance.randint(40, 300)))


def drift(chance: random.Random) -> Iterator[Request]:
    """Yield the same, but every 100 requests the most popular tenant leaves and a new one comes."""
    texts, names = Texts(chance), list(range(60))
    weights = [1 / (rank + 1) for rank in range(60)]
    for number in count():
        if number % 100 == 99:
            names = [*names[1:20], max(names) + 1, *names[20:]]
        [tenant] = chance.choices(names, weights)
        system = texts.named(f"system {tenant}", 500 + 40 * (tenant % 60))
        yield with_answer(texts, system + texts.new(chance.randint(40, 300)))


def agents(chance: random.Random) -> Iterator[Request]:
    """Yield the turns of 40 conversations at a time, behind one of 4 lists of tools.

    Each turn adds the result of a tool. Half of the agents are fast, half wait for people.
    """
    texts = Texts(chance)

    def begun() -> list[int]:
        return list(texts.named(f"tools {chance.randrange(4)}", 2_500))

    running = [begun() for _ in range(40)]
    weights = [8.0 if index % 2 else 1.0 for index in range(40)]
    while True:
        [index] = chance.choices(range(40), weights)
        prompt = running[index] + texts.new(chance.randint(60, 500))
        tokens, num_prompt = with_answer(texts, prompt)
        yield tokens, num_prompt
        running[index] = tokens if len(tokens) < 12_000 else begun()


def scan(chance: random.Random) -> Iterator[Request]:
    """Yield those of tenants, and bursts of long documents that are read once."""
    texts, questions = Texts(chance), tenants(chance)
    while True:
        yield from islice(questions, 60)
        for _ in range(12):
            yield with_answer(texts, texts.new(4_000))


def mixed(chance: random.Random) -> Iterator[Request]:
    """Yield requests of tenants, agents and scans."""
    sources = [tenants(chance), agents(chance), scan(chance)]
    while True:
        yield next(chance.choice(sources))


TRAFFIC: dict[str, Traffic] = {
    "tenants": tenants,
    "drift": drift,
    "agents": agents,
    "scan": scan,
    "mixed": mixed,
}


def price(start: int, stop: int) -> float:
    """Return the cost of computing tokens, in tokens without attention."""
    num_keys = (stop * (stop - 1) - start * (start - 1)) / 2
    return (stop - start) + num_keys / _TOKENS_OF_DOUBLE_PRICE


def replay(traffic: Traffic, policy: EvictionPolicy, num_pages: int, num_requests: int) -> str:
    """Return the shares of prompt tokens found and of work saved, behind a first third."""
    cache = KVCache(num_pages, PAGE_TOKENS, policy)
    found = asked = saved = work = 0.0
    for number, (tokens, num_prompt) in enumerate(islice(traffic(random.Random(7)), num_requests)):
        allocation = cache.admit(tokens[:num_prompt])
        assert allocation is not None, "nothing else runs"
        cache.grow(allocation, len(tokens))
        cache.free(allocation, tokens, len(tokens))
        if number >= num_requests // 3:
            found += allocation.num_cached_tokens
            asked += num_prompt
            saved += price(0, allocation.num_cached_tokens)
            work += price(0, num_prompt)
    return f"{found / asked:.3f} / {saved / work:.3f}"


def main() -> None:
    """Print a line for each policy, a column for each traffic."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=2_000)
    parser.add_argument("--requests", type=int, default=1_500)
    parser.add_argument("--half-lives", default="", help="of cost, in pools, such as 0.25,1,4")
    parser.add_argument("--double-price", type=int, default=32_768, help="of these, the depth")
    args = parser.parse_args()
    policies: dict[str, EvictionPolicy] = {
        name: policy_of(name, args.pages, PAGE_TOKENS) for name in POLICIES
    }
    for text in filter(None, args.half_lives.split(",")):
        half_life, depth = float(text) * args.pages, args.double_price / PAGE_TOKENS
        policies[f"cost {text}"] = CostAware(half_life, depth)
    print(f"{args.pages} pages of {PAGE_TOKENS} tokens, {args.requests} requests of each traffic")
    print("policy".ljust(10), *(name.ljust(15) for name in TRAFFIC), "(tokens / work)")
    for name, policy in policies.items():
        shares = [replay(of, policy, args.pages, args.requests) for of in TRAFFIC.values()]
        print(name.ljust(10), *(share.ljust(15) for share in shares), flush=True)


if __name__ == "__main__":
    main()
