"""How near the GPU's limits the engine comes: a table, as JSON and as markdown.

`python bench/gpu/measure.py OUT [--budget-s 480] [--only SECTION ...]`: Llama-3.1-8B's shape
in bfloat16 with random weights. A section that fails, or has no time left, is reported as failed
and leaves the others valid. The limits are measured first: a copy, a matrix product. `--device cpu`
rehearses it without a GPU: a tiny model, small sizes, and figures that mean nothing.
"""

# ruff: noqa: T201 - printing is its only purpose

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cases import Case, Limits, case_of, seconds

from configs.schema import ModelSection, OctavoConfig, SchedulerSection
from model import build
from model.attention.interface import (
    FEW_QUERIES,
    AttentionBatch,
    AttentionSpec,
    PagedAttention,
    RowViews,
)
from model.attention.registry import choose_backend
from model.interface import (
    Constraint,
    InFlightStep,
    ModelInfo,
    ModelRunner,
    SamplingParams,
    StepInput,
    StepOutput,
    Vocabulary,
)
from model.kv.format import CODED_FORMATS, KVFormat, KVLayout, float_format
from model.kv.pool import KVPool
from model.packing import NO_WINDOW
from scheduler.engine import Engine
from scheduler.messages import GenerateRequest, Submit


@dataclass
class Report:
    """Rows of figures, in order."""

    case: Case
    limits: Limits
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, what: str, value: float, unit: str, *, share: float | None = None) -> None:
        """Note a figure and, where there is one, its share of the limit."""
        self.rows.append({"what": what, "value": value, "unit": unit, "share": share})
        of = "" if share is None else f"  {share:.0%}"
        print(f"{what}: {value:.4g} {unit}{of}", flush=True)

    @contextmanager
    def finding(self, what: str) -> Iterator[str]:
        """Record a section's failure, and continue with the next."""
        try:
            yield what
        except Exception as error:  # noqa: BLE001 - it is the finding
            self.failed(what, f"{type(error).__name__}: {error}")

    def failed(self, what: str, why: str) -> None:
        """Record a failure in place of a figure."""
        self.rows.append({"what": what, "failed": why})
        print(f"{what}: FAILED: {why}", flush=True)


def attention(
    case: Case,
    name: str,
    rows: int,
    context: int,
    queries: int,
    kv_format: KVFormat | None = None,
    *,
    has_views: bool = False,
) -> tuple[float, int]:
    """Time a backend over layers too many for the cache to hold: (seconds, bytes it must read).

    `has_views`: as in a recorded step, whose rows may have views and have none here.
    """
    device, dtype = case.device, case.dtype
    heads, kv_heads, head_dim = case.heads
    stored = kv_format or float_format(dtype)
    num_bytes = rows * context * KVLayout(1, kv_heads, head_dim, 1, stored).bytes_per_page
    layers = max(1, min(case.layers, 2**28 // num_bytes))
    windows = (None,) * layers
    spec = AttentionSpec(
        layers, heads, kv_heads, head_dim, head_dim**-0.5, windows, dtype, stored, device
    )
    offer = choose_backend(name, spec)
    page_size = offer.page_size(None)
    each = -(-context // page_size)
    pool = KVPool(spec.layout(page_size), rows * each, device)
    table = torch.randperm(rows * each, device=device).int().view(rows, each)
    positions = torch.arange(context - queries, context, device=device).repeat(rows, 1)
    slots = table.long().gather(1, positions // page_size) * page_size + positions % page_size
    batch = AttentionBatch(
        query_starts=torch.arange(rows + 1, device=device, dtype=torch.int32) * queries,
        seq_lens=torch.full((rows,), context, device=device, dtype=torch.int32),
        block_table=table,
        positions=positions.flatten(),
        kv_slots=slots.flatten(),
        max_query_len=queries,
        max_seq_len=context,
        views=plain_views(positions.flatten(), rows) if has_views else None,
    )
    backend: Any = offer.build(spec, pool)
    q, k = (
        torch.randn(rows * queries, each_heads, head_dim, device=device, dtype=dtype)
        for each_heads in (heads, kv_heads)
    )

    sink_q = q if has_views else None

    def compute() -> Tensor:
        backend.plan(batch)
        found = q
        for layer in range(layers):
            # Where it can, without the write of the step's own keys.
            read = isinstance(backend, PagedAttention)
            rest = (sink_q,) if read else (k, k, sink_q)
            found = (backend.read if read else backend.attend)(layer, q, *rest)
        return found

    return seconds(device, case.record()(compute)) / layers, num_bytes


def plain_views(positions: Tensor, num_rows: int) -> RowViews:
    """Return the views of rows that have none of their own."""
    sinks = torch.zeros(num_rows, dtype=torch.int32, device=positions.device)
    windows = torch.full_like(sinks, NO_WINDOW)
    return RowViews(sinks, windows, torch.full_like(positions, -1), has_sinks=True)


def measure_attention(report: Report) -> None:
    """Compare decodes and drafts with a copy, and prompts with a matrix product."""
    case, limits = report.case, report.limits
    for name, (rows, context) in product(case.backends, case.sizes.decodes):
        with report.finding(f"decode attention, {name}, {rows} x {context}") as what:
            taken_s, num_bytes = attention(case, name, rows, context, 1)
            share = num_bytes / taken_s / limits.copy_bytes_per_s
            report.add(what, taken_s * 1e6, "us a layer", share=share)
    for name, (rows, context) in product(case.backends, case.sizes.drafts):
        with report.finding(f"draft attention, {name}, {rows} x {context}, 8 queries") as what:
            taken_s, num_bytes = attention(case, name, rows, context, FEW_QUERIES)
            share = num_bytes / taken_s / limits.copy_bytes_per_s
            report.add(what, taken_s * 1e6, "us a layer", share=share)
    for rows, context in case.sizes.decodes:
        with report.finding(f"decode attention with views as inputs, {rows} x {context}") as what:
            taken_s, num_bytes = attention(
                case, case.backends[-1], rows, context, 1, has_views=True
            )
            share = num_bytes / taken_s / limits.copy_bytes_per_s
            report.add(what, taken_s * 1e6, "us a layer", share=share)
    for kv_format, (rows, context) in product(CODED_FORMATS, case.sizes.coded):
        with report.finding(
            f"decode attention, {kv_format.name} pages, {rows} x {context}"
        ) as what:
            taken_s, num_bytes = attention(case, case.backends[-1], rows, context, 1, kv_format)
            share = num_bytes / taken_s / limits.copy_bytes_per_s
            report.add(what, taken_s * 1e6, "us a layer", share=share)
    tokens = case.sizes.prompt_tokens
    for name in case.backends:
        with report.finding(f"prompt attention, {name}, 1 x {tokens}") as what:
            taken_s, _ = attention(case, name, 1, tokens, tokens)
            heads, _, head_dim = case.heads
            flops = 2 * heads * head_dim * tokens**2
            report.add(what, taken_s * 1e3, "ms a layer", share=flops / taken_s / limits.flops)


@dataclass
class Timed:
    """A runner, and how long the host waited for it."""

    runner: ModelRunner
    waited_s: float = 0.0

    @property
    def info(self) -> ModelInfo:
        return self.runner.info

    @property
    def max_steps_in_flight(self) -> int:
        return self.runner.max_steps_in_flight

    def launch(self, step: StepInput) -> InFlightStep:
        return _TimedStep(self, self.runner.launch(step))

    def idle(self) -> bool:
        return self.runner.idle()

    def read_page(self, page_id: int) -> bytes | memoryview:
        return self.runner.read_page(page_id)

    def write_page(self, page_id: int, contents: memoryview) -> None:
        self.runner.write_page(page_id, contents)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        self.runner.set_vocabulary(vocabulary)

    def prepare(self, grammar: str) -> Future[Constraint]:
        return self.runner.prepare(grammar)

    def forced_tokens(self, slot: int) -> list[int]:
        return self.runner.forced_tokens(slot)

    def close(self) -> None:
        self.runner.close()


@dataclass
class _TimedStep:
    timed: Timed
    in_flight_step: InFlightStep

    def wait(self) -> StepOutput:
        began_s = time.perf_counter()
        output = self.in_flight_step.wait()
        self.timed.waited_s += time.perf_counter() - began_s
        return output


def measure_engine(report: Report) -> None:
    """Measure steps of the whole engine, in this process."""
    case, sizes, limits = report.case, report.case.sizes, report.limits
    config = OctavoConfig(
        model=ModelSection.model_validate({"device": case.device.type}),
        scheduler=SchedulerSection(
            max_num_seqs=sizes.rows[-1],
            max_num_batched_tokens=sizes.prompt_tokens,
            # So that all rows have begun before the first has ended.
            max_decode_slowdown=100.0,
        ),
    )
    began_s = time.perf_counter()
    timed = Timed(build.make_runner(build.resolve_source(f"dummy:{case.path}"), config))
    report.add("from nothing to ready", time.perf_counter() - began_s, "s")
    for name, size in timed.info.device_bytes:
        report.add(f"memory: {name}", size / 2**30, "GiB")
    print(*timed.info.notes, sep="\n")
    engine = Engine(timed, config.scheduler, time.monotonic, lambda _: None)
    ids = iter(range(10**6))
    chance = random.Random(0)

    def submit(num_tokens: int, max_tokens: int) -> None:
        prompt = tuple(chance.randrange(timed.info.vocab_size) for _ in range(num_tokens))
        engine.handle(
            Submit(
                next(ids), GenerateRequest(prompt, SamplingParams(max_tokens, 0.0, ignore_eos=True))
            )
        )

    def drain() -> float:
        began_s = time.perf_counter()
        while engine.has_work:
            engine.step()
        return time.perf_counter() - began_s

    submit(sizes.prompts[-1], 1)
    drain()
    heads, _, head_dim = case.heads
    for num_tokens in sizes.prompts:
        taken_s = min(_prompt_s(submit, drain, num_tokens) for _ in range(3))
        attending = 2 * heads * head_dim * case.layers * num_tokens**2
        share = (2 * case.layer_weights * num_tokens + attending) / taken_s / limits.flops
        report.add(f"engine, prompt of {num_tokens}", taken_s * 1e3, "ms", share=share)
    for rows in sizes.rows:
        for _ in range(rows):
            submit(sizes.context, 2 * sizes.num_steps)
        taken_s, host_s = _decode_s(engine, timed, rows, sizes.num_steps)
        drain()
        num_tokens = rows * (sizes.context + sizes.num_steps)
        num_bytes = (case.layer_weights + case.head_weights) * case.dtype.itemsize
        num_bytes += num_tokens * case.layers * case.kv_token_bytes
        share = num_bytes / taken_s / limits.copy_bytes_per_s
        what = f"engine, decode {rows} x {sizes.context}"
        report.add(what, taken_s * 1e3, "ms a step", share=share)
        report.add(f"of which the host is busy, {rows} rows", host_s * 1e3, "ms")
    engine.check()
    engine.close()


def _prompt_s(submit: Callable[[int, int], None], drain: Callable[[], float], tokens: int) -> float:
    submit(tokens, 1)
    return drain()


def _decode_s(engine: Engine, timed: Timed, rows: int, most: int) -> tuple[float, float]:
    """Return a step's time and the host's share of it, over those in which all rows decode."""
    while engine.step().num_step_tokens != rows:
        pass
    num_steps, began_s, timed.waited_s = 0, time.perf_counter(), 0.0
    while num_steps < most:
        if engine.step().num_step_tokens != rows:
            raise AssertionError("others than decodes were measured")
        num_steps += 1
    taken_s = time.perf_counter() - began_s
    return taken_s / num_steps, (taken_s - timed.waited_s) / num_steps


def measure_limits(report: Report) -> None:
    """Report the limits that shares refer to."""
    report.add("copy", report.limits.copy_bytes_per_s / 1e12, "TB/s, read and written")
    report.add("matrix product", report.limits.flops / 1e12, "TFLOP/s")


SECTIONS: dict[str, Callable[[Report], None]] = {
    "limits": measure_limits,
    "attention": measure_attention,
    "engine": measure_engine,
}


def markdown(rows: Iterable[dict[str, Any]], about: str) -> str:
    """Return the report as a page."""
    lines = [f"# {about}", "", "| what | figure | of the limit |", "|---|---|---|"]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['what']} | failed: {row['failed']} | |")
        else:
            share = "" if row["share"] is None else f"{row['share']:.0%}"
            lines.append(f"| {row['what']} | {row['value']:.4g} {row['unit']} | {share} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the requested sections, and write each result at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget-s", type=float, default=480.0)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    args = parser.parse_args()
    began_s = time.monotonic()
    case = case_of(args.device)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "a rehearsal on a CPU"
    about = f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}, {args.commit}"
    report = Report(case, Limits(case))
    args.out.mkdir(parents=True, exist_ok=True)
    for section in args.only:
        with report.finding(section):
            if time.monotonic() - began_s > args.budget_s:
                raise TimeoutError("no time left")
            SECTIONS[section](report)
        torch.cuda.empty_cache()
        (args.out / "gpu.json").write_text(json.dumps({"about": about, "rows": report.rows}))
        (args.out / "gpu.md").write_text(markdown(report.rows, about))
    sys.exit(any("failed" in row for row in report.rows))


if __name__ == "__main__":
    main()
