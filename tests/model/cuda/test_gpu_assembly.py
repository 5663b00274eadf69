"""The GPU's assembly, as far as it needs no GPU: largest step, memory plan, fused layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import step_of
from torch import Tensor

from cache.view import View
from configs.schema import CacheSection, ModelSection, OctavoConfig, SchedulerSection
from model import build
from model.architectures.transformer import Transformer
from model.attention.interface import PagedAttention
from model.attention.triton_attention import TritonAttention
from model.cuda.assembly import dry_run, graph_sizes, largest_step, viewed_step
from model.cuda.decoder import GpuDecoder
from model.cuda.graphs import DecodeGraphs, GraphPlan, GraphSize
from model.cuda.ops import GpuOps
from model.interface import RowSpan, SampleSpan, SamplingParams, SlotStart, StepInput
from model.kv.format import KV_FORMATS
from model.kv.memory_plan import DeviceUse, MemoryPlanError
from model.kv.pool import KVPool
from model.runner import SCORED_TOKENS, TorchRunner

GIB = 2**30
PARAMS = SamplingParams(max_tokens=1)
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "initializer_range": 0.5,
}


@pytest.fixture
def runner(tmp_path: Path) -> TorchRunner:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return build.make_runner(
        build.resolve_source(f"dummy:{path}"),
        OctavoConfig(
            model=ModelSection(quantization="none", attention_backend="torch", device="cpu"),
            cache=CacheSection(kv_cache_memory=2**18, page_size=4),
            scheduler=SchedulerSection(max_num_seqs=5, max_num_batched_tokens=40),
        ),
    )


@pytest.mark.parametrize(
    ("tokens", "seqs", "max_len", "counts"),
    [
        (8192, 4, 100_000, [8189, 1, 1, 1]),
        (100, 4, 33, [32, 32, 32, 4]),
        (100, 2, 33, [32, 32]),
        (3, 8, 33, [1, 1, 1]),
    ],
)
def test_the_largest_step_has_all_tokens_and_samples_all_rows(
    tokens: int, seqs: int, max_len: int, counts: list[int]
) -> None:
    step = largest_step(tokens, seqs, max_len, 16, PARAMS)
    assert step.rows == [RowSpan(0, 0, count) for count in counts]
    assert step.samples == [SampleSpan(row, n - 1, 1) for row, n in enumerate(counts)]
    assert len(step.scored[0].token_ids) == min(counts[0], SCORED_TOKENS)
    assert len(step.token_ids) == sum(counts)
    assert [len(pages) for pages in step.page_ids] == [-(-count // 16) for count in counts]


def test_the_largest_step_can_be_computed(runner: TorchRunner) -> None:
    step = largest_step(40, 5, 64, 4, PARAMS)
    dry_run(runner, step)
    # Where requests may have views, with such rows too.
    assert runner._packer.pack(step).views is None
    dry_run(runner, viewed_step(step))
    views = runner._packer.pack(viewed_step(step)).views
    assert views is not None
    assert views.sinks.tolist() == [1, 0, 0, 0, 0]
    # Every slot has had penalties, so their counts are part of the measured memory.
    assert len(runner._sampler._counts.row_of_slot) == 5


@pytest.mark.parametrize(
    ("settings", "has_drafts"),
    [
        ({}, False),
        ({"speculation": "auto"}, True),
        ({"speculative_config": '{"method": "ngram"}'}, True),
    ],
)
def test_steps_with_drafts_are_recorded_where_drafts_are_made(
    settings: dict[str, Any], has_drafts: bool
) -> None:
    config = OctavoConfig(scheduler=SchedulerSection(max_num_seqs=5, **settings))
    sizes = graph_sizes(config.scheduler)
    assert any(size.has_drafts for size in sizes) == has_drafts


def use(**changes: Any) -> DeviceUse:
    given = {
        "total_bytes": 80 * GIB,
        "free_bytes": 60 * GIB,
        "step_tokens": 8192,
        "step_rows": 256,
        "step_bytes": 5 * GIB,
        "graph_bytes": GIB,
    }
    return DeviceUse(**(given | changes))


def test_pages_get_what_step_graphs_and_reserve_leave() -> None:
    assert use().reserve_bytes == 80 * GIB // 50
    assert use().page_bytes == 60 * GIB - 5 * GIB - GIB - 80 * GIB // 50
    assert use(total_bytes=8 * GIB).reserve_bytes == GIB // 2
    account = dict(use().account(16 * GIB, 50 * GIB))
    assert account["weights"] == 16 * GIB
    assert account["graphs"] == GIB


def test_what_cannot_fit_says_by_how_much_and_which_flag() -> None:
    said = r"max_num_batched_tokens: .* 6 GiB of 80 GiB .* 8192 tokens .* 5 GiB.*1\.6 GiB too much"
    with pytest.raises(MemoryPlanError, match=said):
        _ = use(free_bytes=6 * GIB).page_bytes


def _three_steps() -> list[StepInput]:
    """Return prompts, a decode beside a chunk, and decodes."""
    return [
        step_of(
            [3, 4, 5, 6, 7],
            [RowSpan(0, 0, 3), RowSpan(0, 0, 2)],
            [0, 1],
            [[1, 2], [3]],
            [SampleSpan(0, 2, 1), SampleSpan(1, 1, 1)],
            [],
            [SlotStart(slot, PARAMS, [1]) for slot in (0, 1)],
        ),
        step_of(
            [8, 9, 9, 9],
            [RowSpan(3, 3, 1), RowSpan(2, 2, 3)],
            [0, 1],
            [[1, 2], [3, 4]],
            [SampleSpan(0, 0, 1), SampleSpan(1, 2, 1)],
        ),
        step_of(
            [8, 9],
            [RowSpan(4, 4, 1), RowSpan(5, 5, 1)],
            [0, 1],
            [[1, 2], [3, 4]],
            [SampleSpan(0, 0, 1), SampleSpan(1, 0, 1)],
        ),
    ]


def test_the_fused_decoder_computes_what_the_plain_one_does(runner: TorchRunner) -> None:
    """Over pages that hold a past, prompts and decodes side by side, with norms of q and k."""
    transformer = runner._decoder
    assert isinstance(transformer, Transformer)
    spec, pool = transformer.attention_spec(KV_FORMATS["float32"]), runner._pool
    attention = TritonAttention(spec, pool)
    assert not isinstance(runner._attention, PagedAttention)
    steps = _three_steps()
    found: list[list[Tensor]] = []
    for decoder, backend in (
        (transformer, runner._attention),
        (GpuDecoder(transformer, GpuOps()), attention),
    ):
        runner._decoder, runner._attention = decoder, backend
        with torch.inference_mode():
            found.append([])
            for step in steps:
                hidden, sampled = runner._compute(runner._packer.pack(step), None)
                found[-1].append(decoder.logits(hidden[sampled]))
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


def test_the_fused_decoder_stores_the_codes_of_rotated_keys(runner: TorchRunner) -> None:
    """One layer has codes, the other floats; with the same operations nothing differs."""
    transformer = runner._decoder
    assert isinstance(transformer, Transformer)
    transformer._ops = GpuOps()
    spec = transformer.attention_spec(KV_FORMATS["int4"])
    spec = replace(spec, other_formats={1: KV_FORMATS["float32"]})
    found: list[list[Tensor]] = []
    for decoder in (transformer, GpuDecoder(transformer, GpuOps())):
        pool = KVPool(spec.layout(4), 6, torch.device("cpu"))
        runner._decoder, runner._attention = decoder, TritonAttention(spec, pool)
        found.append([])
        with torch.inference_mode():
            for step in _three_steps():
                hidden, sampled = runner._compute(runner._packer.pack(step), None)
                found[-1].append(hidden[sampled])
        keys, values, scales = pool.pages(0)
        assert scales[0].isfinite().all()
        found[-1] += [plane.view(torch.uint8) for plane in (keys, values, *scales)]
    for plain, fused in zip(*found, strict=True):
        assert torch.equal(fused, plain)


def _step(rows: list[tuple[int, int, int]], started: Sequence[SlotStart] = ()) -> StepInput:
    """Return rows of (slot, position, tokens), each sampled after its last one."""
    spans = [RowSpan(position, position, count) for _, position, count in rows]
    pages = [[1, 2, 3, 4] if slot == 0 else [5, 6] for slot, _, _ in rows]
    samples = [SampleSpan(row, span.count - 1, 1) for row, span in enumerate(spans)]
    token_ids = [7 * (at + i) % 300 for _, at, count in rows for i in range(count)]
    slots = [slot for slot, _, _ in rows]
    return step_of(token_ids, spans, slots, pages, samples, started=started)


def test_views_are_inputs_of_recorded_steps(runner: TorchRunner) -> None:
    """Rows with and without views, drafts, and positions behind the held ones."""
    transformer, device = runner._decoder, torch.device("cpu")
    assert isinstance(transformer, Transformer)
    transformer.hold_positions(10)
    spec = transformer.attention_spec(KV_FORMATS["float32"])
    pool = KVPool(spec.layout(4), 8, device)
    attention, decoder = TritonAttention(spec, pool), GpuDecoder(transformer, GpuOps())
    plan = GraphPlan((GraphSize(1, 1), GraphSize(2, 2), GraphSize(3, 2)), 64, 4, (7,))
    graphs = DecodeGraphs(decoder, attention, plan, device, lambda compute: compute, decoder)
    recorded = TorchRunner(
        info=runner.info,
        decoder=decoder,
        attention=attention,
        pool=pool,
        sampler=runner._sampler,
        max_num_seqs=5,
        graphs=graphs,
        viewed=decoder,
    )
    # The queries from position 8 on are in view.
    view = View(2, 6)
    prompts = _step(
        [(0, 0, 12), (1, 0, 2)], [SlotStart(0, PARAMS, [1], view=view), SlotStart(1, PARAMS, [1])]
    )
    decodes = (
        _step([(0, 12, 1), (1, 2, 1)]),
        _step([(0, 13, 2), (1, 3, 1)]),
        _step([(1, 4, 1)]),
        _step([(0, 15, 1)]),
        _step([(1, 5, 1)]),
    )
    for step in (prompts, *decodes):
        results = []
        for one in (runner, recorded):
            packed = one._packer.pack(step)
            assert (packed.views is not None) == (0 in step.slots)
            assert (graphs.pad(packed) is None) == (step is prompts)
            with torch.inference_mode():
                hidden, sampled = one._compute(packed, None)
                results.append(transformer.logits(hidden[sampled]))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
