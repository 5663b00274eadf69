"""Builds a runner on CUDA: measures the memory of a step and its graphs; the rest is for pages.

Tests cover the measured step and the plan made from it (`model/kv/memory_plan.py`);
docs/performance.md has the status on GPUs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from cache.view import View
from configs.schema import OctavoConfig, SchedulerSection
from configs.sizes import format_size
from model.architectures.transformer import Decoder, ServedDecoder, Transformer, ViewedDecoder
from model.attention.groups import build_parts, part_of
from model.attention.interface import AttentionSpec, BackendOffer, PagedAttention
from model.cuda.decoder import GpuDecoder
from model.cuda.graphs import DecodeGraphs, GraphPlan, GraphSize, record_on_cuda, recorded_sizes
from model.cuda.ops import GpuOps
from model.group_plan import group_sizes
from model.interface import ModelInfo, SamplingParams, ScoredSpan, SlotStart, StepInput
from model.kv.memory_plan import DeviceUse, PoolPlan, WindowedPool
from model.runner import SCORED_TOKENS, TorchRunner
from model.sampling.sampler import Sampler

#: Steps in flight: while one runs, the next is planned, packed and launched.
_MAX_STEPS_IN_FLIGHT = 2

#: The sampling settings that take most memory, one after the other, each in all rows.
_COSTLIEST = (
    SamplingParams(max_tokens=9, temperature=1.0, seed=1),
    SamplingParams(
        max_tokens=9,
        top_p=0.9,
        top_k=50,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        logprobs=20,
        prompt_logprobs=20,
        allowed_token_ids=tuple(range(50)),
        bad_words=((0, 1),),
    ),
)


@dataclass(frozen=True, slots=True)
class GpuParts:
    """The parts of a runner that do not depend on the number of pages."""

    decoder: ServedDecoder
    offer: BackendOffer
    #: Describes the runner with this pool.
    info_of: Callable[[PoolPlan], ModelInfo]
    spec: AttentionSpec
    ops: GpuOps | None
    config: OctavoConfig


def assemble_on_gpu(parts: GpuParts, plan_of: Callable[[int], PoolPlan]) -> TorchRunner:
    """Build the runner; `plan_of` turns free bytes into pages. Raises `MemoryPlanError`."""
    device = parts.decoder.device
    use = _measure(parts)
    page_bytes = use.page_bytes
    plan = plan_of(page_bytes)
    parts.decoder.hold_positions(plan.max_model_len)
    account = use.account(parts.decoder.weights_bytes, plan.total_bytes)
    uses = ", ".join(f"{name} {format_size(size)}" for name, size in account)
    info = parts.info_of(plan)
    notes = (*info.notes, f"memory of the GPU: {uses}")
    sizes = graph_sizes(parts.config.scheduler)
    runner = _runner(parts, replace(info, device_bytes=account, notes=notes), sizes)
    torch.cuda.synchronize(device)
    return runner


def graph_sizes(config: SchedulerSection) -> tuple[GraphSize, ...]:
    """Return the steps to record.

    Those with drafts only where drafts are made: they double the time of recording. A graph that
    is recorded later would halt all streams while kernels compile, and take memory that is pages.
    """
    return recorded_sizes(config.max_num_seqs, has_drafts=config.drafting.kind("cuda") != "none")


def _runner(parts: GpuParts, info: ModelInfo, sizes: tuple[GraphSize, ...]) -> TorchRunner:
    """Build a runner with the number of pages in `info`, and graphs of these sizes."""
    served, config = parts.decoder, parts.config
    device = served.device
    # One more page than the scheduler has: the rows that pad a recorded step write there.
    scratch_pages = [info.num_pages, *([info.windowed.num_pages] if info.windowed else ())]
    num_windowed = info.windowed.num_pages + 1 if info.windowed else None
    sizes_of_pages = info.page_size, info.num_pages + 1, num_windowed
    built = build_parts(parts.offer, parts.spec, *sizes_of_pages, device)
    attention = built.attention
    decoder: Decoder = served
    viewed: ViewedDecoder | None = None
    # Layers of transformers stay as they are, and may do things that cannot be recorded.
    if isinstance(served, Transformer) and isinstance(part_of(attention, 0)[0], PagedAttention):
        fused = GpuDecoder(served, parts.ops) if parts.ops else served
        decoder, viewed = fused, None if info.why_no_views else fused
    else:
        sizes = ()
    graphs = None
    if sizes:
        plan = GraphPlan(sizes, info.max_model_len, info.page_size, tuple(scratch_pages))
        with torch.inference_mode():
            record = record_on_cuda(device)
            graphs = DecodeGraphs(decoder, attention, plan, device, record, viewed)
    max_num_seqs = config.scheduler.max_num_seqs
    return TorchRunner(
        info=info,
        decoder=decoder,
        attention=attention,
        pool=built.pool,
        windowed_pool=built.windowed_pool,
        sampler=Sampler(max_num_seqs, info.vocab_size, info.eos_token_ids, device),
        max_num_seqs=max_num_seqs,
        graphs=graphs,
        max_steps_in_flight=_MAX_STEPS_IN_FLIGHT,
        viewed=viewed,
    )


def _measure(parts: GpuParts) -> DeviceUse:
    """Run the largest step and record graphs, on two pages; then free all of it."""
    device, config = parts.decoder.device, parts.config
    arch = parts.decoder.arch
    page_size = parts.offer.page_size(config.cache.page_size)
    max_len = config.model.max_model_len or arch.max_positions
    groups = group_sizes(config, parts.spec, page_size, max_len)
    windowed = WindowedPool(2, 0, groups.view) if groups else None
    info = parts.info_of(PoolPlan(2, page_size, 0, max_len, windowed=windowed))
    max_num_seqs = config.scheduler.max_num_seqs
    sizes = graph_sizes(parts.config.scheduler)

    def free_bytes() -> int:
        torch.cuda.synchronize(device)
        return torch.cuda.mem_get_info(device)[0]

    # The measured steps have no later position.
    parts.decoder.hold_positions(min(max_len, config.scheduler.max_num_batched_tokens))
    before = free_bytes()
    runner = _runner(parts, info, ())
    step = largest_step(
        config.scheduler.max_num_batched_tokens,
        max_num_seqs,
        max_len,
        page_size,
        _COSTLIEST[0],
        has_windowed=groups is not None,
    )
    dry_run(runner, step)
    if not info.why_no_views:
        dry_run(runner, viewed_step(step))
    after_step = free_bytes()
    # All graphs share the memory of the largest; each takes some of its own.
    first = _runner(parts, info, sizes[-1:])
    after_first = free_bytes()
    both = _runner(parts, info, sizes[-2:])
    after_both = free_bytes()
    del runner, first, both
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    each = max((after_first - after_both) - (after_step - after_first), 0)
    return DeviceUse(
        total_bytes=total,
        free_bytes=free,
        step_tokens=len(step.token_ids),
        step_rows=len(step.rows),
        step_bytes=before - after_step,
        graph_bytes=after_step - after_first + each * max(len(sizes) - 1, 0),
    )


def dry_run(runner: TorchRunner, step: StepInput) -> None:
    """Compute a step with the most demanding sampling, as often at a time as steps may overlap."""
    for params in _COSTLIEST:
        starts = [replace(start, params=params) for start in step.started]
        in_flight_steps = [
            runner.launch(replace(step, started=starts)) for _ in range(runner.max_steps_in_flight)
        ]
        for in_flight_step in in_flight_steps:
            in_flight_step.wait()


def viewed_step(step: StepInput) -> StepInput:
    """Return a step in whose rows some keys are hidden, as far as they have three tokens."""
    view = View(sinks=1, window=1)
    return replace(step, started=[replace(start, view=view) for start in step.started])


def largest_step(
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    page_size: int,
    params: SamplingParams,
    *,
    has_windowed: bool = False,
) -> StepInput:
    """Return the step that takes most memory: as many tokens as allowed, and every row samples.

    Some tokens are scored, too. All pages are page 0, since the results are not used.
    """
    num_rows = min(max_num_seqs, max_num_batched_tokens)
    counts: list[int] = []
    left = max_num_batched_tokens
    for rows_after in reversed(range(num_rows)):
        counts.append(min(left - rows_after, max_model_len - 1))
        left -= counts[-1]
    tokens = sum(counts)
    rows = list(range(num_rows))
    tables = [[0] * -(-count // page_size) for count in counts]
    return StepInput(
        token_ids=[0] * tokens,
        positions=[0] * num_rows,
        counts=counts,
        slots=rows,
        page_ids=tables,
        windowed_page_ids=tables if has_windowed else [],
        sample_rows=rows,
        scored=[ScoredSpan(0, 0, [0] * min(counts[0], SCORED_TOKENS))],
        started=[SlotStart(row, params, [0] * counts[row]) for row in rows],
    )
