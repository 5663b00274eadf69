"""Sequences that keep the keys of the highest scores, on real pages: against the plain definition.

The oracle has no pages: it keeps keys in lists, and drops them head by head as the code of MorphKV
(arXiv:2503.00979) and of H2O (arXiv:2306.14048) does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from served_pages import Served, serve
from steps import step_of
from torch import Tensor

from cache.selection import Selection
from configs.schema import CacheSection, ModelSection, OctavoConfig, SchedulerSection
from model import build
from model.architectures.transformer import Transformer
from model.attention.interface import AttentionSpec, QueryCopy
from model.cpu.decoder import CpuDecoder
from model.interface import RowSpan, SampleSpan, SamplingParams, SlotStart, TokenLogprobs
from model.key_selection import why_not
from model.kv.format import KV_FORMATS, KVLayout
from model.runner import TorchRunner
from model.weight_sums import WeightSums
from scheduler.messages import GenerateRequest, Submit

_PAGE_SIZE, _CHUNK, _NUM_PAGES = 4, 16, 96
_CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 320,
    "initializer_range": 0.5,
}
_SELECTIONS = (
    Selection(4, 12, interval=6),
    Selection(3, 20, "max", interval=5),
    Selection(8, 9, interval=1),
    Selection(4, 12, interval=6, scoring="all"),
)
_PROMPT = tuple(i * i % 89 for i in range(50))

Make = Callable[..., TorchRunner]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    runners: dict[tuple[Any, ...], TorchRunner] = {}

    def make(
        backend: str,
        quantization: str = "none",
        kv_cache_dtype: str = "auto",
        *,
        changes: dict[str, Any] | None = None,
        **cache: Any,
    ) -> TorchRunner:
        key = (backend, quantization, kv_cache_dtype, str(changes), str(cache))
        if key not in runners:
            path: Path = tmp_path_factory.mktemp("tiny") / "config.json"
            path.write_text(json.dumps(_CONFIG | (changes or {})))
            name = "float32" if quantization == "none" else "bfloat16"
            name = name if kv_cache_dtype == "auto" else kv_cache_dtype
            layout = KVLayout(2, 2, 16, _PAGE_SIZE, KV_FORMATS[name])
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
                        kv_cache_memory=_NUM_PAGES * layout.bytes_per_page,
                        kv_cache_dtype=kv_cache_dtype,  # type: ignore[arg-type] # parsed
                        page_size=_PAGE_SIZE,
                        **cache,
                    ),
                    scheduler=SchedulerSection(max_num_seqs=2, max_num_batched_tokens=_CHUNK),
                ),
            )
        return runners[key]

    return make


class ListAttention:
    """Attention of one sequence over lists of keys, which are dropped by the definition."""

    name = "lists"

    def __init__(self, spec: AttentionSpec, selection: Selection, num_prompt: int) -> None:
        self.spec, self.selection, self.num_prompt = spec, selection, num_prompt
        self.group = spec.num_heads // spec.num_kv_heads
        heads = [(layer, head) for layer in range(2) for head in range(spec.num_kv_heads)]
        self.keys: dict[tuple[int, int], list[Tensor]] = {one: [] for one in heads}
        self.values: dict[tuple[int, int], list[Tensor]] = {one: [] for one in heads}
        #: Of each key, the weights that queries gave it so far.
        self.sums: dict[tuple[int, int], list[float]] = {one: [] for one in heads}
        #: By layer, `[heads, head_dim]` each.
        self.queries: list[list[Tensor]] = [[], []]
        self.most_keys = 0

    def plan(self, batch: object) -> None:
        """See `AttentionBackend`."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sink_q: Tensor | None = None
    ) -> Tensor:
        """See `AttentionBackend`."""
        assert sink_q is None
        rows = []
        for query, key, value in zip(q, k, v, strict=True):
            self.drop(layer, len(self.queries[layer]))
            self.queries[layer].append(query)
            heads = []
            for head in range(self.spec.num_kv_heads):
                keys, values = self.keys[layer, head], self.values[layer, head]
                keys.append(key[head])
                values.append(value[head])
                self.sums[layer, head].append(0.0)
                for one in query[head * self.group : (head + 1) * self.group]:
                    weights = (torch.stack(keys) @ one * self.spec.scale).softmax(0)
                    heads.append(weights @ torch.stack(values))
                    sums = zip(self.sums[layer, head], weights.tolist(), strict=True)
                    self.sums[layer, head] = [sum(pair) for pair in sums]
            rows.append(torch.cat(heads))
        return torch.stack(rows)

    def drop(self, layer: int, position: int) -> None:
        """Drop keys before the token at `position`, if there is a compaction point."""
        window, capacity = self.selection.window, self.selection.capacity
        num_stored = len(self.keys[layer, 0])
        if position < self.num_prompt or num_stored < capacity + self.selection.interval:
            return
        for head in range(self.spec.num_kv_heads):
            keys, values = self.keys[layer, head], self.values[layer, head]
            older = torch.stack(keys[:-window])
            fused = []
            for query in self.queries[layer][-window:]:
                logits = torch.zeros(len(older))
                for one in query[head * self.group : (head + 1) * self.group]:
                    logits += older @ one * self.spec.scale
                fused.append(logits.softmax(0))
            weights = torch.stack(fused)
            scores = weights.sum(0) if self.selection.fusion == "sum" else weights.max(0).values
            if self.selection.scoring == "all":
                scores = torch.tensor(self.sums[layer, head][:-window])
            kept = sorted(scores.topk(capacity - window).indices.tolist())
            kept += range(num_stored - window, num_stored)
            self.keys[layer, head] = [keys[index] for index in kept]
            self.values[layer, head] = [values[index] for index in kept]
            self.sums[layer, head] = [self.sums[layer, head][index] for index in kept]


@torch.inference_mode()
def oracle(runner: TorchRunner, request: GenerateRequest) -> tuple[list[int], list[float]]:
    """Return the greedy tokens of a request, and their log-probabilities."""
    decoder: Any = runner._decoder
    assert isinstance(decoder, Transformer)
    assert request.selection is not None
    prompt = request.prompt_token_ids
    spec: Any = runner._attention
    attention: Any = ListAttention(spec._spec, request.selection, len(prompt))
    tokens, logprobs, known, position = list[int](), list[float](), [*prompt], 0
    while len(tokens) < request.params.max_tokens:
        positions = torch.arange(position, position + len(known))
        hidden = decoder.forward(torch.tensor(known), positions, attention)
        distribution = decoder.logits(hidden[-1:]).log_softmax(-1)[0]
        position += len(known)
        known = [int(distribution.argmax())]
        tokens += known
        logprobs.append(float(distribution.max()))
    return tokens, logprobs


def request_of(
    selection: Selection | None, prompt: tuple[int, ...] = _PROMPT, num: int = 60
) -> GenerateRequest:
    params = SamplingParams(num, temperature=0.0, ignore_eos=True, logprobs=0)
    return GenerateRequest(prompt, params, selection=selection)


def numbers(logprobs: list[TokenLogprobs]) -> list[float]:
    return [one.logprob for one in logprobs]


@pytest.mark.parametrize(
    ("selection", "num_prompt", "num"),
    [
        (_SELECTIONS[0], 50, 200),
        (_SELECTIONS[1], 5, 70),
        (_SELECTIONS[2], 30, 40),
        (_SELECTIONS[3], 30, 100),
    ],
    ids=["sum", "max", "each token", "h2o"],
)
def test_tokens_are_those_of_the_plain_definition(
    make: Make, selection: Selection, num_prompt: int, num: int
) -> None:
    request = request_of(selection, _PROMPT[:num_prompt], num)
    expected, logprobs = oracle(make("torch"), request)
    for backend in ("reference", "torch", "cpu"):
        served = serve(make(backend), [request], _CHUNK)
        assert served.tokens == [expected], backend
        assert numbers(served.logprobs[0]) == pytest.approx(logprobs, abs=1e-3), backend
        assert served.num_pages <= selection.num_pages(num_prompt, _PAGE_SIZE)
    full = serve(make("torch"), [replace(request, selection=None)], _CHUNK)
    assert full.tokens != [expected], "dropped keys do count"


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8", "int4"])
@pytest.mark.parametrize("selection", [_SELECTIONS[0], _SELECTIONS[3]], ids=["morph", "h2o"])
def test_no_state_of_a_sequence_changes_a_bit(
    make: Make, kv_cache_dtype: str, selection: Selection
) -> None:
    """Alone, in chunks, beside others, warm, and resumed by another engine anywhere."""
    runner = make("cpu", "bf16", kv_cache_dtype)
    if not isinstance(runner._decoder, CpuDecoder):
        pytest.skip("the compiled decoder is not available here")
    request, other = request_of(selection), request_of(_SELECTIONS[1], _PROMPT[:30], 30)
    alone = serve(runner, [request], 64)

    def require_same(served: Served, num_known: int = 0) -> None:
        assert served.tokens[0] == alone.tokens[0][num_known:]
        assert served.logprobs[0] == alone.logprobs[0][num_known:], "a bit differs"

    require_same(serve(runner, [request], 7))
    require_same(serve(runner, [request, other], _CHUNK))
    require_same(serve(runner, [request, request_of(None, _PROMPT[:40], 30)], 32, rounds=2))
    for num_known in (1, 10, 30):
        known = tuple(alone.tokens[0][:num_known])
        resumed = Submit(0, request, output_token_ids=known)
        require_same(serve(runner, [resumed], _CHUNK), num_known)


@pytest.mark.parametrize("quantization", ["bf16", "int8"])
def test_compiled_layers_copy_the_queries_of_those_in_torch(make: Make, quantization: str) -> None:
    runner = make("cpu", quantization)
    decoder, attention = runner._decoder, runner._attention
    if not isinstance(decoder, CpuDecoder):
        pytest.skip("the compiled decoder is not available here")
    row, sample = RowSpan(0, 0, 2), SampleSpan(0, 1, 1)
    packed = runner._packer.pack(step_of([0, 1], [row], [0], [[0]], [sample]))
    batch = packed.on(torch.device("cpu")).batch
    attention.plan(batch)
    spec: AttentionSpec = attention._spec  # type: ignore[attr-defined] # of all backends here
    found = []
    for one in (decoder, decoder._transformer):
        copy = QueryCopy(spec, torch.tensor([1]), 2)
        with torch.inference_mode():
            one.forward(torch.tensor([5, 6]), batch.positions, attention, None, copy)
        found.append(copy.queries)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("cuts", [[1100], [1000, 1001, 1100]], ids=str)
def test_sums_are_those_of_all_weights(cuts: list[int]) -> None:
    """In parts of queries and of keys; of the first key most of all, which all queries read."""
    draw = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(1100, 4, 8, generator=draw), torch.randn(1100, 2, 8, generator=draw)
    sums, first = WeightSums(2, 0.5), 0
    for end in cuts:
        sums.add(queries[first:end], first, lambda begin, stop: keys[begin:stop])
        first = end
    logits = torch.einsum("qhgd,khd->hgqk", queries.view(1100, 2, 2, 8), keys) * 0.5
    weights = logits.masked_fill(torch.ones(1100, 1100).triu(1).bool(), -torch.inf).softmax(-1)
    expected = weights.double().sum((1, 2))
    torch.testing.assert_close(sums.sums, expected, rtol=1e-5, atol=1e-5)
    assert sums.sums.sum() == pytest.approx(2 * 2 * 1100, rel=1e-5)


def test_a_token_that_is_computed_again_is_summed_once(make: Make) -> None:
    runner = make("torch")
    serve(runner, [request_of(_SELECTIONS[3], num=1)], 64)
    start = SlotStart(0, SamplingParams(9), [1, 2, 3], selection=_SELECTIONS[3])
    sample, pages = SampleSpan(0, 0, 1), [[0, 1]]
    prompt = RowSpan(0, 0, 3), SampleSpan(0, 2, 1)
    runner.launch(step_of([1, 2, 3], [prompt[0]], [0], pages, [prompt[1]], started=[start])).wait()
    assert runner._selections is not None
    sums = runner._selections._slots[0].sums
    assert sums[1].sums.sum() == pytest.approx(3 * 4, rel=1e-5)
    for _ in range(2):
        runner.launch(step_of([7], [RowSpan(3, 3, 1)], [0], pages, [sample])).wait()
        assert sums[1].sums.sum() == pytest.approx(4 * 4, rel=1e-5)


def test_a_step_without_a_selection_is_refused(make: Make) -> None:
    runner = make("torch")
    dropping = step_of([1], [RowSpan(5, 3, 1)], [0], [[0, 1]], [SampleSpan(0, 0, 1)])
    starts = [SlotStart(0, SamplingParams(1), [1, 2])]
    runner.launch(
        step_of([1, 2], [RowSpan(0, 0, 2)], [0], [[0]], [SampleSpan(0, 1, 1)], started=starts)
    ).wait()
    with pytest.raises(ValueError, match="dropped keys, but its sequence has no selection"):
        runner.launch(dropping)
    bare = TorchRunner(
        info=replace(runner.info, why_no_selections="layers of the model have windows"),
        decoder=runner._decoder,
        attention=runner._attention,
        pool=runner._pool,
        sampler=runner._sampler,
        max_num_seqs=2,
    )
    with pytest.raises(ValueError, match="dropped keys cannot be computed"):
        bare.launch(dropping)
    starts = [SlotStart(0, SamplingParams(1), [1, 2], selection=_SELECTIONS[0])]
    with pytest.raises(ValueError, match="by their scores: layers of the model have windows"):
        bare.launch(
            step_of([1, 2], [RowSpan(0, 0, 2)], [0], [[0]], [SampleSpan(0, 1, 1)], started=starts)
        )


@pytest.mark.parametrize(
    ("backend", "given", "message"),
    [
        ("torch", {"kv_policy": "morph:16/320"}, ""),
        (
            "torch",
            {"kv_policy": "morph:16/321"},
            "holds 321 tokens, more than the 320",
        ),
        ("reference", {"kv_cache_dtype": "kivi4", "kv_policy": "morph:16/64"}, "read as a whole"),
        (
            "torch",
            {
                "kv_policy": "morph:16/64",
                "changes": {"model_type": "mistral", "sliding_window": 40},
            },
            "layers of the model have windows",
        ),
    ],
    ids=["fits", "too large", "kivi4", "windows"],
)
def test_a_default_that_cannot_be_served_is_refused_at_the_start(
    make: Make, backend: str, given: dict[str, Any], message: str
) -> None:
    if not message:
        assert make(backend, **given).info.why_not(is_selection=True) == ""
        return
    with pytest.raises(ValueError, match=f"kv_policy: morph:16/.* {message}"):
        make(backend, **given)


def test_models_of_other_attention_are_refused_by_name(make: Make) -> None:
    runner = make("torch")
    spec: AttentionSpec = runner._attention._spec  # type: ignore[attr-defined] # of all backends here
    assert why_not(spec) == ""
    assert "latent attention" in why_not(replace(spec, latent_dim=8))
    assert "caps its attention scores" in why_not(replace(spec, softcap=30.0))
    info = replace(runner.info, why_no_views="it is on cuda", why_no_selections="it has windows")
    assert info.why_not(is_selection=True) == "it is on cuda"
    assert replace(info, why_no_views="").why_not(is_selection=False) == ""
