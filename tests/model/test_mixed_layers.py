"""Windowed layers beside others: their pages are given back, read no more, and used again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixed_runners import LAYER_BYTES, WINDOW, grouped_cache, mixed_runner

from cache.view import FULL_VIEW, View
from configs.schema import SchedulerSection
from model.cpu.decoder import CpuDecoder
from model.interface import SamplingParams
from model.runner import TorchRunner
from scheduler.drafters.choice import BestDrafter
from scheduler.engine import Engine
from scheduler.messages import GenerateRequest, Submit
from scheduler.scheduler import Scheduler
from server.kv_sizes import full_length_requests, kv_bytes, page_bytes

_CHUNK, _PAGE_SIZE, _NUM_SEQS, _NUM_OUTPUT = 8, 4, 2, 40
_PROMPT = tuple(i * i % 89 for i in range(150))
#: Pages of a prompt and an answer in the layer that reads all keys, and of two sequences' windows
#: and a chunk in the windowed ones.
_FULL_PAGES, _WINDOWED_PAGES = 48, 2 * (WINDOW // _PAGE_SIZE + 2) + _CHUNK // _PAGE_SIZE
_SMALL = (_FULL_PAGES + 2 * _WINDOWED_PAGES) * _PAGE_SIZE * LAYER_BYTES
_LARGE = 8 * _SMALL

Make = Callable[..., TorchRunner]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    runners: dict[Any, TorchRunner] = {}

    def make(backend: str, memory: int, **changes: Any) -> TorchRunner:
        key = (backend, memory, *sorted(map(str, changes.items())))
        if key not in runners:
            runners[key] = mixed_runner(
                tmp_path_factory.mktemp("tiny"),
                backend,
                memory,
                page_size=changes.pop("page_size", _PAGE_SIZE),
                max_num_seqs=_NUM_SEQS,
                max_num_batched_tokens=_CHUNK,
                config={"max_position_embeddings": 512} | changes.pop("config", {}),
                **changes,
            )
        return runners[key]

    return make


def poison(runner: TorchRunner, free_ids: list[tuple[int, ...]]) -> None:
    """Fill free pages with NaN: the scales where there are codes."""
    for pool, ids in zip((runner._pool, runner._windowed_pool), free_ids, strict=True):
        assert pool is not None
        for plane in pool._planes:
            if plane.dtype.is_floating_point and plane.dtype.itemsize > 1:
                plane[:, list(ids)] = torch.nan


def serve(
    runner: TorchRunner, requests: list[GenerateRequest], budget: int = _CHUNK
) -> tuple[list[list[int]], int]:
    """Return the tokens of requests, and the most windowed pages that they held after a step."""
    cache = grouped_cache(runner, budget)
    section = SchedulerSection(max_num_seqs=_NUM_SEQS, max_num_batched_tokens=budget)
    scheduler = Scheduler(cache, section, runner.info)
    tokens: list[list[int]] = [[] for _ in requests]
    most = 0
    for number, request in enumerate(requests):
        assert scheduler.submit(Submit(number, request)) == []
    while scheduler.has_work:
        plan = scheduler.plan()
        if plan is None:
            continue
        outcome = scheduler.apply(plan, runner.launch(plan.step).wait())
        for at, token_id in zip(outcome.request_ids, outcome.token_ids, strict=True):
            tokens[at].append(token_id)
        stats = cache.windowed.stats()
        most = max(most, stats.pages_private + stats.pages_leased)
        poison(runner, [group._pool.free_ids for group in cache.groups])
        scheduler.check()
    return tokens, most


def request_of(prompt: tuple[int, ...] = _PROMPT, view: View = FULL_VIEW) -> GenerateRequest:
    params = SamplingParams(_NUM_OUTPUT, temperature=0.0, ignore_eos=True)
    return GenerateRequest(prompt, params, view=view)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_a_small_windowed_group_gives_the_tokens_of_a_large_one(make: Make, backend: str) -> None:
    small, large = make(backend, _SMALL), make(backend, _LARGE)
    assert small.info.windowed is not None
    sizes = small.info.num_pages, small.info.windowed.num_pages
    assert sizes == (_FULL_PAGES, _WINDOWED_PAGES)
    # One group of pages in the same memory would not even take the prompt.
    assert len(_PROMPT) > _SMALL // (3 * LAYER_BYTES)
    [expected], _ = serve(large, [request_of()], budget=64)
    [tokens], most = serve(small, [request_of()])
    assert tokens == expected
    assert most <= (WINDOW + _CHUNK) // _PAGE_SIZE + 1


def test_backends_agree_and_many_share_a_small_pool(make: Make) -> None:
    prompts = [(*_PROMPT[:40], n, *_PROMPT[:n]) for n in range(1, 5)]
    requests = [request_of(prompt) for prompt in prompts]
    expected = [serve(make("torch", _LARGE), [one])[0][0] for one in requests]
    for backend in ("cpu", "torch", "reference"):
        found, most = serve(make(backend, _SMALL), requests)
        assert found == expected
        assert most <= _WINDOWED_PAGES


@pytest.mark.parametrize("kv_format", ["int8", "fp8", "int4"])
def test_codes_are_in_both_groups(make: Make, kv_format: str) -> None:
    formats = {"kv_cache_dtype": kv_format}
    [small, large] = (make("torch", memory, **formats) for memory in (_SMALL // 2, _LARGE))
    assert kv_bytes(small.info) <= _SMALL // 2
    [expected], _ = serve(large, [request_of(_PROMPT[:90])])
    [tokens], most = serve(small, [request_of(_PROMPT[:90])])
    assert tokens == expected
    assert most <= (WINDOW + _CHUNK) // _PAGE_SIZE + 1
    skipping = make("torch", _LARGE, **formats, kv_cache_dtype_skip_layers=["sliding_window"])
    assert skipping._windowed_pool is not None
    assert skipping._windowed_pool.pages(0).keys.dtype == torch.float32
    assert not skipping._windowed_pool.pages(1).scales
    assert skipping._pool.pages(0).scales
    assert len(serve(skipping, [request_of(_PROMPT[:20])])[0][0]) == _NUM_OUTPUT


def test_pages_encoded_as_a_whole_are_in_both_groups(make: Make) -> None:
    runner = make("reference", _LARGE, kv_cache_dtype="kivi4", page_size=8)
    prompt = _PROMPT[:50]
    [expected], _ = serve(runner, [request_of(prompt)])
    [tokens], _ = serve(runner, [request_of(prompt)], budget=5)
    assert tokens == expected


@pytest.mark.parametrize("view", [View(window=64), View(4, 12), View(20, 20)], ids=str)
def test_a_requests_view_goes_with_the_windows(make: Make, view: View) -> None:
    other = request_of(_PROMPT[:30])
    [expected], _ = serve(make("reference", _LARGE), [request_of(view=view)], budget=64)
    for backend in ("cpu", "torch"):
        small = make(backend, _SMALL)
        assert small.info.why_no_views == ""
        [tokens, _], _ = serve(small, [request_of(view=view), other])
        assert tokens == expected


@pytest.mark.parametrize("quantization", ["bf16", "int8"])
def test_the_compiled_decoder_finds_the_pages_of_both_groups(make: Make, quantization: str) -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = {"model_type": "qwen3", "use_sliding_window": True, "layer_types": types}
    settings = {"config": config, "quantization": quantization}
    # Pages are half as wide: the pool is larger, but not the windowed group's share of it.
    runner, large = make("cpu", _SMALL // 2, **settings), make("cpu", _LARGE, **settings)
    if not isinstance(runner._decoder, CpuDecoder):
        pytest.skip("the compiled decoder is not available here")
    assert runner.info.num_pages == _FULL_PAGES
    [expected], _ = serve(large, [request_of()], budget=64)
    for view in (FULL_VIEW, View(window=256)):
        assert serve(runner, [request_of(view=view)])[0][0] == expected
    [bounded, other], _ = serve(runner, [request_of(view=View(4, 12)), request_of(_PROMPT[:30])])
    assert [bounded] == serve(large, [request_of(view=View(4, 12))], budget=64)[0]
    assert [other] == serve(large, [request_of(_PROMPT[:30])], budget=64)[0]
    assert len({*bounded}) > 3, "random enough to tell them apart"
    [exact], _ = serve(make("reference", _LARGE, **settings), [request_of(_PROMPT[:30])])
    # Products of attention may round: the first tokens are far enough from each other.
    assert exact[:3] == other[:3]


def test_a_draft_model_has_pages_of_the_layers_without_a_window(make: Make) -> None:
    """All of its layers do, though some read a window; answers are those without drafts."""
    prompts = [_PROMPT[:70], (*_PROMPT[:40], 7)]
    expected = [serve(make("torch", _LARGE), [request_of(prompt)])[0][0] for prompt in prompts]
    runner = make("torch", _SMALL * 2, has_draft=True)
    assert runner.info.windowed is not None
    # Its keys are in 16 bits: three layers take as much as one and a half.
    assert runner.info.kv_bytes_per_token == 4.5 * LAYER_BYTES
    assert page_bytes(runner.info) == 2.5 * LAYER_BYTES * _PAGE_SIZE
    section = SchedulerSection(
        max_num_seqs=_NUM_SEQS,
        max_num_batched_tokens=16,
        speculation="draft:it",
        speculative_tokens=4,
        debug=True,
    )
    engine = Engine(runner, section, lambda: 0.0, lambda _: None)
    for kind in engine._scheduler._speculation._kinds[:-1]:
        kind.drafter = BestDrafter([])
    tokens: list[list[int]] = [[] for _ in prompts]
    for _ in ("cold", "warm"):
        for number, prompt in enumerate(prompts):
            engine.handle(Submit(number, request_of(prompt)))
            tokens[number].clear()
        while engine.has_work:
            result = engine.step()
            assert not result.failed
            for at, token_id in zip(result.request_ids, result.token_ids, strict=True):
                tokens[at].append(token_id)
        assert tokens == expected
    [drafts] = engine.stats().scheduler.speculation.drafters
    assert drafts.accepted_tokens_total > 0
    assert engine.stats().cache.windowed is not None


def test_one_group_is_enough_where_no_sequence_is_longer_than_the_window(make: Make) -> None:
    short = make("torch", _LARGE, config={"max_position_embeddings": WINDOW})
    assert short.info.windowed is None
    assert kv_bytes(short.info) <= _LARGE
    every = ["sliding_attention"] * 3
    windowed = make("torch", _LARGE, config={"layer_types": every})
    assert (windowed.info.windowed, windowed.info.view) == (None, View(window=WINDOW))


def test_the_sizes_of_both_groups_are_reported(make: Make) -> None:
    info = make("cpu", _SMALL).info
    assert info.windowed is not None
    assert kv_bytes(info) == _SMALL
    assert info.kv_bytes_per_token == 3 * LAYER_BYTES
    assert page_bytes(info) == _PAGE_SIZE * LAYER_BYTES
    assert info.max_model_len == _FULL_PAGES * _PAGE_SIZE
    assert full_length_requests(info) == 1
    assert info.windowed.view == View(window=WINDOW)
    [note] = [one for one in info.notes if "pages of their own" in one]
    assert note.startswith(f"1 layers read all keys and have {_FULL_PAGES} pages; 2 layers read 16")
