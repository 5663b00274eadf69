"""Requests served to the end by a runner on real pages, where all free pages are NaN."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cache.kv_cache import KVCache
from configs.schema import SchedulerSection
from model.interface import TokenLogprobs
from model.runner import TorchRunner
from scheduler.messages import GenerateRequest, Submit
from scheduler.scheduler import Scheduler


class Served(NamedTuple):
    """Of each request; and the most pages that were held at a time."""

    tokens: list[list[int]]
    logprobs: list[list[TokenLogprobs]]
    num_pages: int


def serve(
    runner: TorchRunner, requests: list[GenerateRequest | Submit], budget: int, rounds: int = 1
) -> Served:
    """Serve requests together, `rounds` times on the same cache; return the last round.

    All pages that are free after a step are filled with NaN.
    """
    info = runner.info
    cache = KVCache(info.num_pages, info.page_size, view=info.view, chunk_tokens=budget)
    section = SchedulerSection(max_num_seqs=2, max_num_batched_tokens=budget)
    scheduler = Scheduler(cache, section, info)
    served = Served([], [], 0)
    for _ in range(rounds):
        served = Served([[] for _ in requests], [[] for _ in requests], 0)
        for number, request in enumerate(requests):
            submit = request if isinstance(request, Submit) else Submit(number, request)
            assert scheduler.submit(submit) == []
        while plan := scheduler.plan():
            outcome = scheduler.apply(plan, runner.launch(plan.step).wait())
            for at, token_id in zip(outcome.request_ids, outcome.token_ids, strict=True):
                served.tokens[at].append(token_id)
            for at, one in zip(outcome.request_ids, outcome.logprobs, strict=True):
                served.logprobs[at].extend([one] if one else [])
            stats = cache.stats()
            most = max(served.num_pages, stats.pages_private + stats.pages_leased)
            served = served._replace(num_pages=most)
            _poison(runner, torch.tensor(cache._pool.free_ids, dtype=torch.int64))
            scheduler.check()
    return served


def _poison(runner: TorchRunner, page_ids: torch.Tensor) -> None:
    for layer in range(runner._pool.layout.num_layers):
        pages = runner._pool.pages(layer)
        # Codes are never NaN, their scales are.
        for plane in pages.scales or (pages.keys, pages.values):
            plane[page_ids] = torch.nan
