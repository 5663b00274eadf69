"""The property worth most: a request's tokens do not depend on what happens around it.

A tiny model with random weights, the real scheduler, cache, decoder, attention and sampler. Every
request gives the same tokens alone, batched, chunked, preempted, warm, cold and with drafts.
"""

from __future__ import annotations

import json
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

import hypothesis.strategies as st
import pytest
from coded_runners import coded_runners
from hypothesis import given, settings
from latent_runners import latent_runners
from mixed_runners import mixed_runners
from scripted_drafter import ScriptedDrafter, knowing_drafter

from cache.view import FULL_VIEW, View
from configs.kv_cache import CODED_DTYPES
from configs.schema import CacheSection, ModelSection, OctavoConfig, SchedulerSection
from model import build
from model.cpu.library import load_cpu_library
from model.interface import InFlightStep, SamplingParams, TokenLogprobs, Vocabulary
from model.kv.format import KV_FORMATS, KVLayout
from model.runner import TorchRunner
from scheduler.caches import build_cache
from scheduler.messages import GenerateRequest, Submit
from scheduler.plan import StepPlan
from scheduler.scheduler import Scheduler
from waiting import TIMEOUT_S

_PAGE_SIZE = 4
_CONFIG = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "initializer_range": 0.5,
}
_BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4
#: Each token is the byte of its number, but for the one that ends.
_END = 2
_VOCABULARY = Vocabulary(bytes(range(256)), array("I", range(1, 257)), (_END,), (_END,))
#: Settings under which a token depends on earlier ones on the host, too.
_FOLLOWED: tuple[dict[str, Any], ...] = (
    {"grammar": "start: /[a-m]{5}[0-9]{5}/"},
    {
        "allowed_token_ids": tuple(range(40, 56)),
        "bad_words": tuple(pair for pair in permutations(range(40, 56), 2) if sum(pair) % 3),
    },
)

#: Of requests; most see all keys.
_VIEWS = (FULL_VIEW, FULL_VIEW, View(window=6), View(2, 5), View(5, 3))

MakeRunner = Callable[[int], TorchRunner]


@pytest.fixture(scope="module", params=["cpu", "torch", "overlapped"])
def make_runner(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    overlapped: Callable[[TorchRunner, int], TorchRunner],
) -> Iterator[MakeRunner]:
    """Runners on the same weights, with the given number of pages."""
    path: Path = tmp_path_factory.mktemp("tiny") / "config.json"
    path.write_text(json.dumps(_CONFIG))
    source = build.resolve_source(f"dummy:{path}")
    runners: dict[int, TorchRunner] = {}

    def make(num_pages: int) -> TorchRunner:
        if num_pages not in runners:
            memory = num_pages * _PAGE_SIZE * _BYTES_PER_TOKEN
            backend: Any = "torch" if request.param == "overlapped" else request.param
            runner = build.make_runner(
                source,
                OctavoConfig(
                    model=ModelSection(quantization="none", attention_backend=backend, threads=1),
                    cache=CacheSection(kv_cache_memory=memory, page_size=_PAGE_SIZE),
                    scheduler=SchedulerSection(max_num_seqs=6, max_num_batched_tokens=64),
                ),
            )
            is_overlapped = request.param == "overlapped"
            runners[num_pages] = overlapped(runner, 6) if is_overlapped else runner
            runners[num_pages].set_vocabulary(_VOCABULARY)
        return runners[num_pages]

    yield make
    for runner in runners.values():
        runner.close()


class _Engine:
    def __init__(
        self, runner: TorchRunner, budget: int, drafter: ScriptedDrafter | None = None
    ) -> None:
        self.runner = runner
        config = SchedulerSection(max_num_seqs=6, max_num_batched_tokens=budget)
        self.cache = build_cache(runner.info, config)
        self.scheduler = Scheduler(self.cache, config, runner.info, drafter)
        # A drafter reads known tokens; as in the engine.
        self.max_in_flight = runner.max_steps_in_flight if drafter is None else 1
        self.logprobs: dict[int, list[TokenLogprobs]] = {}
        self.scores: dict[int, list[TokenLogprobs]] = {}

    def run(self, requests: list[Submit]) -> dict[int, list[int]]:
        outputs: dict[int, list[int]] = {request.request_id: [] for request in requests}
        self.scores = {request.request_id: [] for request in requests}
        self.logprobs = {request.request_id: [] for request in requests}
        for request in requests:
            grammar = request.request.params.grammar
            constraint = self.runner.prepare(grammar).result(TIMEOUT_S) if grammar else None
            assert self.scheduler.submit(request, constraint) == []
        in_flight: deque[tuple[StepPlan, InFlightStep]] = deque()
        for _ in range(1000):
            if not self.scheduler.has_work and not in_flight:
                return outputs
            while len(in_flight) < self.max_in_flight and (plan := self.scheduler.plan()):
                in_flight.append((plan, self.runner.launch(plan.step)))
            if not in_flight:
                # The only one there was preempted itself.
                continue
            plan, in_flight_step = in_flight.popleft()
            outcome = self.scheduler.apply(plan, in_flight_step.wait())
            for request_id, token_id in zip(outcome.request_ids, outcome.token_ids, strict=True):
                outputs[request_id].append(token_id)
            for request_id, entry in zip(outcome.request_ids, outcome.logprobs, strict=False):
                self.logprobs[request_id] += [entry] if entry else []
            for request_id, scores in outcome.prompt_logprobs:
                self.scores[request_id] += scores
            assert not outcome.failed
            self.scheduler.check()
        raise AssertionError("it does not end")

    def told(self) -> dict[int, list[tuple[int, Any]]]:
        """Return the last run's prompt_logprobs and logprobs, by request."""
        return {
            request_id: [
                (one.token_id, pytest.approx(one.logprob, abs=1e-3))
                for one in (*scores, *self.logprobs[request_id])
            ]
            for request_id, scores in self.scores.items()
        }


@st.composite
def _requests(draw: Any) -> list[Submit]:
    """Return a few requests whose prompts often share their beginnings."""
    stems = draw(st.lists(st.lists(st.integers(3, 255), max_size=14), min_size=1, max_size=2))
    requests = []
    for request_id in range(draw(st.integers(1, 6))):
        tail = draw(st.lists(st.integers(3, 255), min_size=1, max_size=6))
        params = SamplingParams(
            max_tokens=draw(st.integers(1, 10)),
            temperature=draw(st.sampled_from([0.0, 0.0, 1.0])),
            seed=draw(st.integers(0, 3)),
            top_p=draw(st.sampled_from([1.0, 0.9])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3])),
            prompt_logprobs=draw(st.sampled_from([None, None, 0])),
            logprobs=draw(st.sampled_from([None, None, 2])),
            ignore_eos=True,
            **draw(st.sampled_from([{}, {}, *_FOLLOWED])),
        )
        prompt = (*draw(st.sampled_from(stems)), *tail)
        view = draw(st.sampled_from(_VIEWS))
        requests.append(Submit(request_id, GenerateRequest(prompt, params, view=view)))
    return requests


@settings(max_examples=40)
@given(
    requests=_requests(),
    budget=st.integers(6, 40),
    num_pages=st.sampled_from([9, 12, 60]),
    draft_period=st.sampled_from([1, 3, 1000]),
)
def test_alone_batched_chunked_preempted_warm_and_cold_are_the_same(
    make_runner: MakeRunner,
    requests: list[Submit],
    budget: int,
    num_pages: int,
    draft_period: int,
) -> None:
    _check_states(make_runner, requests, budget, num_pages, draft_period)


def _check_states(
    make_runner: MakeRunner,
    requests: list[Submit],
    budget: int,
    num_pages: int,
    draft_period: int,
) -> None:
    roomy = make_runner(60)
    if roomy.info.why_no_views:
        requests = [replace(one, request=replace(one.request, view=FULL_VIEW)) for one in requests]
    alone: dict[int, list[int]] = {}
    scores: dict[int, list[tuple[int, Any]]] = {}
    for request in requests:
        engine = _Engine(roomy, budget=64)
        alone |= engine.run([request])
        scores |= engine.told()
    engine = _Engine(make_runner(num_pages), budget)
    for state in ("cold", "warm"):
        assert engine.run(requests) == alone, state
        assert engine.told() == scores, state
    engine = _Engine(make_runner(num_pages), budget, knowing_drafter(requests, alone, draft_period))
    assert engine.run(requests) == alone, "with drafts"
    assert engine.told() == scores, "with drafts"
    stats = engine.cache.stats()
    assert stats.pages_private == stats.pages_leased == 0


#: Formats that round, and the attention backends that read them: of the compiled one an example of
#: codes by token, and both by page.
_CODED = [
    *((name, "reference") for name in CODED_DTYPES),
    *((name, "cpu") for name in ("int8", "kivi4", "kivi2")),
]


@pytest.fixture(scope="module", params=_CODED, ids=" by ".join)
def make_coded_runner(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MakeRunner]:
    """Runners whose pages are codes, and none of whose results depends on the batch."""
    if isinstance(reason := load_cpu_library(), str):
        pytest.skip(reason)
    path: Path = tmp_path_factory.mktemp("coded") / "config.json"
    path.write_text(json.dumps(_CONFIG))
    layout = KVLayout(2, 2, 16, _PAGE_SIZE, KV_FORMATS[request.param[0]])
    yield from coded_runners(path, layout, request.param[1], _VOCABULARY)


@settings(max_examples=5)
@given(
    requests=_requests(),
    budget=st.integers(6, 40),
    num_pages=st.sampled_from([9, 12, 60]),
    draft_period=st.sampled_from([1, 3, 1000]),
)
def test_pages_of_codes_change_no_token_in_any_state(
    make_coded_runner: MakeRunner,
    requests: list[Submit],
    budget: int,
    num_pages: int,
    draft_period: int,
) -> None:
    _check_states(make_coded_runner, requests, budget, num_pages, draft_period)


@pytest.fixture(scope="module", params=["latent", "cpu", "torch", "overlapped"])
def make_other_runner(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    overlapped: Callable[[TorchRunner, int], TorchRunner],
) -> Iterator[MakeRunner]:
    """Runners of a model with one plane of pages, whose rows meet in its experts.

    The others are of a model whose windowed layers have pages of their own.
    """
    folder = tmp_path_factory.mktemp("other")
    if request.param == "latent":
        yield from latent_runners(folder, _PAGE_SIZE, _VOCABULARY)
        return
    is_overlapped = request.param == "overlapped"
    yield from mixed_runners(
        *(folder, _PAGE_SIZE, _VOCABULARY),
        backend="torch" if is_overlapped else request.param,
        overlapped=overlapped if is_overlapped else None,
    )


@settings(max_examples=8)
@given(
    requests=_requests(),
    budget=st.integers(6, 40),
    num_pages=st.sampled_from([9, 12, 60]),
    draft_period=st.sampled_from([1, 3, 1000]),
)
def test_latent_pages_experts_and_groups_of_pages_change_no_token_in_any_state(
    make_other_runner: MakeRunner,
    requests: list[Submit],
    budget: int,
    num_pages: int,
    draft_period: int,
) -> None:
    _check_states(make_other_runner, requests, budget, num_pages, draft_period)


def test_the_property_is_about_something(make_runner: MakeRunner) -> None:
    """Preemption, chunks and shared pages do happen in runs like the above."""
    _check_runs(make_runner)


def test_so_is_that_of_latent_pages_and_groups(make_other_runner: MakeRunner) -> None:
    _check_runs(make_other_runner)


def _check_runs(make_runner: MakeRunner) -> None:
    params = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
    stem = tuple(range(40, 50))
    requests = [Submit(i, GenerateRequest((*stem, 100 + i), params)) for i in range(6)]
    engine = _Engine(make_runner(10), budget=6)
    tokens = engine.run(requests)
    stats = engine.scheduler.stats()
    assert stats.preemptions_total > 0
    assert engine.cache.stats().copied_pages_total > 0
    assert stats.prefix_hits_tokens_total > 0
    assert len(set(map(tuple, tokens.values()))) > 1
    engine = _Engine(make_runner(60), 64, knowing_drafter(requests, tokens, 5))
    assert engine.run(requests) == tokens
    [drafts] = engine.scheduler.stats().speculation.drafters
    assert 0 < drafts.accepted_tokens_total < drafts.offered_tokens_total


@pytest.mark.parametrize("quantization", ["bf16", "int8"])
def test_drafts_change_no_bit_of_the_compiled_decoder(
    tmp_path: Path, quantization: Literal["bf16", "int8"]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_CONFIG))
    runner = build.make_runner(
        build.resolve_source(f"dummy:{path}"),
        OctavoConfig(
            model=ModelSection(quantization=quantization, threads=1, weights_cache="off"),
            cache=CacheSection(kv_cache_memory=64 * _PAGE_SIZE * _BYTES_PER_TOKEN, page_size=4),
            scheduler=SchedulerSection(max_num_seqs=6, max_num_batched_tokens=64),
        ),
    )
    if "cpu" not in runner.info.attention_backend:
        pytest.skip("the compiled decoder is not available here")
    requests = [
        Submit(
            request_id,
            GenerateRequest(
                tuple(range(40, 50 + request_id)),
                SamplingParams(24, temperature=temperature, ignore_eos=True, logprobs=3),
            ),
        )
        for request_id, temperature in enumerate((0.0, 0.8, 1.0))
    ]
    engine = _Engine(runner, 64)
    outputs = engine.run(requests)
    for period in (2, 3, 1000):
        drafted = _Engine(runner, 64, knowing_drafter(requests, outputs, period))
        assert drafted.run(requests) == outputs
        assert drafted.logprobs == engine.logprobs
        [drafts] = drafted.scheduler.stats().speculation.drafters
        assert drafts.accepted_tokens_total > 0
    runner.close()
