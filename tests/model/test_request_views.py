"""Requests with views of their own on real keys: longer than pool and context, in reused pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import served_pages
from served_pages import Served
from steps import step_of

from cache.view import FULL_VIEW, View
from configs.schema import CacheSection, ModelSection, OctavoConfig, SchedulerSection
from model import build
from model.cpu.decoder import CpuDecoder
from model.interface import RowSpan, SampleSpan, SamplingParams, SlotStart, TokenLogprobs
from model.runner import TorchRunner
from scheduler.messages import GenerateRequest

_PAGE_SIZE, _CHUNK = 4, 16
_CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
_VIEWS = (View(window=32), View(4, 28), View(20, 9))
#: Three times the model's context.
_PROMPT = tuple(i * i % 89 for i in range(190))

Make = Callable[..., TorchRunner]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    runners: dict[tuple[str, str, int], TorchRunner] = {}

    def make(backend: str, num_pages: int, quantization: str = "none", **cache: Any) -> TorchRunner:
        key = (backend, quantization, num_pages)
        if cache or key not in runners:
            path: Path = tmp_path_factory.mktemp("tiny") / "config.json"
            path.write_text(json.dumps(_CONFIG))
            bytes_per_token = 2 * 2 * 2 * 16 * (4 if quantization == "none" else 2)
            runners[key] = build.make_runner(
                build.resolve_source(f"dummy:{path}"),
                OctavoConfig(
                    model=ModelSection(
                        quantization=quantization,  # type: ignore[arg-type] # parsed
                        attention_backend=backend,  # type: ignore[arg-type] # parsed
                        threads=1,
                        weights_cache="off",
                    ),
                    cache=CacheSection(
                        kv_cache_memory=num_pages * bytes_per_token * _PAGE_SIZE,
                        page_size=_PAGE_SIZE,
                        **cache,
                    ),
                    scheduler=SchedulerSection(max_num_seqs=2, max_num_batched_tokens=_CHUNK),
                ),
            )
        return runners[key]

    return make


def serve(runner: TorchRunner, requests: list[GenerateRequest], budget: int = _CHUNK) -> Served:
    return served_pages.serve(runner, [*requests], budget)


def request_of(view: View, prompt: tuple[int, ...] = _PROMPT, num: int = 40) -> GenerateRequest:
    params = SamplingParams(num, temperature=0.0, ignore_eos=True, logprobs=0)
    return GenerateRequest(prompt, params, view=view)


def numbers(logprobs: list[TokenLogprobs]) -> list[float]:
    return [one.logprob for one in logprobs]


@pytest.mark.parametrize("view", _VIEWS, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_a_small_pool_gives_the_tokens_of_a_large_one(make: Make, backend: str, view: View) -> None:
    small, large = make(backend, 16), make(backend, 128)
    assert small.info.max_model_len == large.info.max_model_len == 64
    [expected], _, _ = serve(large, [request_of(view)], budget=64)
    [tokens], _, most = serve(small, [request_of(view)])
    assert tokens == expected
    num_pages = view.num_pages(_PAGE_SIZE)
    assert num_pages is not None
    assert most <= num_pages + _CHUNK // _PAGE_SIZE


@pytest.mark.parametrize("view", _VIEWS, ids=str)
def test_backends_agree(make: Make, view: View) -> None:
    results = [serve(make(name, 128), [request_of(view)]) for name in ("reference", "cpu", "torch")]
    for tokens, logprobs, _ in results[1:]:
        assert tokens == results[0][0]
        assert numbers(logprobs[0]) == pytest.approx(numbers(results[0][1][0]), abs=1e-3)


@pytest.mark.parametrize("quantization", ["bf16", "int8"])
@pytest.mark.parametrize("view", _VIEWS, ids=str)
def test_the_compiled_decoder_reads_the_view_and_no_cut_changes_a_bit(
    make: Make, view: View, quantization: str
) -> None:
    runner = make("cpu", 128, quantization)
    if not isinstance(runner._decoder, CpuDecoder):
        pytest.skip("the compiled decoder is not available here")
    request, other = request_of(view), request_of(FULL_VIEW, _PROMPT[:30], 20)
    tokens, logprobs, _ = serve(runner, [request], budget=64)
    for budget, more in ((16, []), (7, [other]), (2, [])):
        again = serve(runner, [request, *more], budget)
        assert again[0][0] == tokens[0]
        assert again[1][0] == logprobs[0], "a bit differs"
    oracle = make("reference", 128, quantization)
    _, exact, _ = serve(oracle, [request])
    # Pages and weights are the same; the products of attention may round.
    assert numbers(logprobs[0])[:5] == pytest.approx(numbers(exact[0])[:5], abs=0.1)


def test_a_view_that_hides_nothing_changes_no_bit(make: Make) -> None:
    runner = make("cpu", 128, "bf16")
    short = _PROMPT[:20]
    results = [serve(runner, [request_of(view, short, 8)]) for view in (FULL_VIEW, View(4, 28))]
    assert results[0][:2] == results[1][:2]


def test_a_runner_without_views_refuses_them(make: Make) -> None:
    runner = make("torch", 128)
    bare = TorchRunner(
        info=runner.info,
        decoder=runner._decoder,
        attention=runner._attention,
        pool=runner._pool,
        sampler=runner._sampler,
        max_num_seqs=2,
    )
    started = [SlotStart(0, SamplingParams(1), [1, 2], view=View(window=64))]
    with pytest.raises(ValueError, match="view of its own"):
        bare.launch(
            step_of([1, 2], [RowSpan(0, 0, 2)], [0], [[0]], [SampleSpan(0, 1, 1)], started=started)
        )


@pytest.mark.parametrize(
    ("policy", "message"),
    [("window:64", ""), ("sinks:4+64", "sinks:4\\+64 holds 68 tokens, more than the 64")],
)
def test_a_default_that_cannot_be_served_is_refused_at_the_start(
    make: Make, policy: str, message: str
) -> None:
    if not message:
        assert make("torch", 20, kv_policy=policy).info.why_no_views == ""
        return
    with pytest.raises(ValueError, match=message):
        make("torch", 20, kv_policy=policy)
