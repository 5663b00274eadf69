"""How near the GPU's limits the engine comes: a table, as JSON and as markdown.

`python tests/bench/gpu/measure.py OUT [--budget-s 480] [--only SECTION ...]`: Llama-3.1-8B's shape
in bfloat16 with random weights. A section that fails, or that there is no time left for, is said to
have; the others stand. What a limit is, is measured first: a copy, a matrix product.
"""

# ruff: noqa: T201 - printing is all a benchmark is for

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from configs.schema import ModelSection, OctavoConfig, SchedulerSection
from model import build
from model.attention.interface import AttentionBatch, AttentionSpec
from model.attention.registry import choose_backend
from model.graphs import record_on_cuda
from model.interface import (
    Constraint,
    Flight,
    ModelInfo,
    ModelRunner,
    SamplingParams,
    StepInput,
    StepOutput,
    Vocabulary,
)
from model.kv_pool import KVPool
from scheduler.engine import Engine
from scheduler.messages import Submit

CUDA, BF16 = torch.device("cuda"), torch.bfloat16
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 8, 128, 32
LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
#: What a step multiplies with: all weights but the embedding's table.
PRODUCT_WEIGHTS = LAYERS * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) + 4096 * 128256
KV_BYTES = 2 * LAYERS * KV_HEADS * HEAD_DIM * 2


def seconds(compute: Callable[[], object], *, repeats: int = 20) -> float:
    """Return what one run takes on the GPU: the median of several, after three to warm up."""
    for _ in range(3):
        compute()
    taken: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call] # torch's
        begin.record()
        compute()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken)


@dataclass
class Limits:
    """What this very GPU does at its best."""

    @cached_property
    def copy_bytes_per_s(self) -> float:
        """Bytes read and written a second."""
        source = torch.empty(2**31, dtype=torch.uint8, device=CUDA)
        target = torch.empty_like(source)
        return float(2 * source.nbytes / seconds(lambda: target.copy_(source)))

    @cached_property
    def flops(self) -> float:
        """Of a bfloat16 product of random numbers, 8192 cubed."""
        a, b = (torch.randn(8192, 8192, device=CUDA, dtype=BF16) for _ in range(2))
        return float(2 * 8192**3 / seconds(lambda: a @ b))


@dataclass
class Report:
    """Rows of figures, in order."""

    limits: Limits = field(default_factory=Limits)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, what: str, value: float, unit: str, *, share: float | None = None) -> None:
        """Note a figure and, where there is one, its share of the limit."""
        self.rows.append({"what": what, "value": value, "unit": unit, "share": share})
        of = "" if share is None else f"  {share:.0%}"
        print(f"{what}: {value:.4g} {unit}{of}", flush=True)

    def failed(self, what: str, why: str) -> None:
        """Note what there is no figure of."""
        self.rows.append({"what": what, "failed": why})
        print(f"{what}: FAILED: {why}", flush=True)


def attention(name: str, rows: int, context: int, queries: int) -> tuple[float, int]:
    """Time a backend over layers too many for the cache to hold: (seconds, bytes it must read)."""
    layers = max(1, min(LAYERS, 2**28 // (rows * context * KV_HEADS * HEAD_DIM * 4)))
    spec = AttentionSpec(
        layers, HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5, (None,) * layers, BF16, BF16, CUDA
    )
    offer = choose_backend(name, spec)
    page_size = offer.page_size(None)
    each = -(-context // page_size)
    pool = KVPool(
        num_layers=layers,
        num_pages=rows * each,
        page_size=page_size,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=BF16,
        device=CUDA,
    )
    table = torch.randperm(rows * each, device=CUDA).int().view(rows, each)
    positions = torch.arange(context - queries, context, device=CUDA).repeat(rows, 1)
    slots = table.long().gather(1, positions // page_size) * page_size + positions % page_size
    batch = AttentionBatch(
        query_starts=torch.arange(rows + 1, device=CUDA, dtype=torch.int32) * queries,
        seq_lens=torch.full((rows,), context, device=CUDA, dtype=torch.int32),
        block_table=table,
        positions=positions.flatten(),
        kv_slots=slots.flatten(),
        max_query_len=queries,
        max_seq_len=context,
    )
    backend: Any = offer.build(spec, pool)
    q = torch.randn(rows * queries, HEADS, HEAD_DIM, device=CUDA, dtype=BF16)

    def compute() -> Tensor:
        backend.plan(batch)
        found = q
        for layer in range(layers):
            found = backend.read(layer, q)
        return found

    replay = record_on_cuda(CUDA)(compute)
    return seconds(replay) / layers, rows * context * KV_HEADS * HEAD_DIM * 4


def measure_attention(report: Report) -> None:
    """Decode against a copy, prompts against a matrix product."""
    limits = report.limits
    for name in ("flash", "triton"):
        for rows, context in ((1, 1024), (1, 8192), (8, 1024), (64, 1024), (64, 4096), (256, 1024)):
            what = f"decode attention, {name}, {rows} x {context}"
            try:
                taken_s, num_bytes = attention(name, rows, context, 1)
            except Exception as error:  # noqa: BLE001 - it is the finding
                report.failed(what, f"{type(error).__name__}: {error}")
                continue
            share = num_bytes / taken_s / limits.copy_bytes_per_s
            report.add(what, taken_s * 1e6, "us a layer", share=share)
        what = f"prompt attention, {name}, 1 x 8192"
        try:
            taken_s, _ = attention(name, 1, 8192, 8192)
        except Exception as error:  # noqa: BLE001 - it is the finding
            report.failed(what, f"{type(error).__name__}: {error}")
            continue
        flops = 2 * 2 * HEADS * HEAD_DIM * 8192 * 8192 / 2
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
    def max_flights(self) -> int:
        return self.runner.max_flights

    def launch(self, step: StepInput) -> Flight:
        return _TimedFlight(self, self.runner.launch(step))

    def idle(self) -> bool:
        return self.runner.idle()

    def learn(self, vocabulary: Vocabulary) -> None:
        self.runner.learn(vocabulary)

    def prepare(self, grammar: str) -> Future[Constraint]:
        return self.runner.prepare(grammar)

    def close(self) -> None:
        self.runner.close()


@dataclass
class _TimedFlight:
    timed: Timed
    flight: Flight

    def wait(self) -> StepOutput:
        began_s = time.perf_counter()
        output = self.flight.wait()
        self.timed.waited_s += time.perf_counter() - began_s
        return output


def measure_engine(report: Report) -> None:
    """Steps of the whole engine, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llama-8b.json"
        path.write_text(json.dumps(LLAMA_8B))
        config = OctavoConfig(
            model=ModelSection(device="cuda"),
            scheduler=SchedulerSection(
                max_num_seqs=256,
                max_num_batched_tokens=8192,
                # So that all rows have begun before the first has ended.
                max_decode_slowdown=100.0,
            ),
        )
        began_s = time.perf_counter()
        timed = Timed(build.make_runner(build.resolve_source(f"dummy:{path}"), config))
    report.add("from nothing to ready", time.perf_counter() - began_s, "s")
    for name, size in timed.info.device_bytes:
        report.add(f"memory: {name}", size / 2**30, "GiB")
    print(*timed.info.notes, sep="\n")
    engine = Engine(timed, config.scheduler, time.monotonic, lambda _: None)
    ids = iter(range(10**6))
    chance = random.Random(0)

    def submit(num_tokens: int, max_tokens: int) -> None:
        prompt = tuple(chance.randrange(128000) for _ in range(num_tokens))
        engine.handle(Submit(next(ids), prompt, SamplingParams(max_tokens, 0.0, ignore_eos=True)))

    def drain() -> float:
        began_s = time.perf_counter()
        while engine.has_work:
            engine.step()
        return time.perf_counter() - began_s

    submit(8191, 1)
    drain()
    for num_tokens in (1024, 8191):
        taken_s = min(_prompt_s(submit, drain, num_tokens) for _ in range(3))
        attending = 2 * HEADS * HEAD_DIM * LAYERS * num_tokens**2
        flops = 2 * (PRODUCT_WEIGHTS - 4096 * 128256) * num_tokens + attending
        share = flops / taken_s / report.limits.flops
        report.add(f"engine, prompt of {num_tokens}", taken_s * 1e3, "ms", share=share)
    for rows, context in ((1, 1024), (8, 1024), (64, 1024), (256, 1024)):
        for _ in range(rows):
            submit(context, 200)
        taken_s, host_s = _decode_s(engine, timed, rows)
        drain()
        num_bytes = 2 * PRODUCT_WEIGHTS + rows * (context + 100) * KV_BYTES
        share = num_bytes / taken_s / report.limits.copy_bytes_per_s
        report.add(f"engine, decode {rows} x {context}", taken_s * 1e3, "ms a step", share=share)
        report.add(f"of which the host is busy, {rows} rows", host_s * 1e3, "ms")
    engine.check()
    engine.close()


def _prompt_s(submit: Callable[[int, int], None], drain: Callable[[], float], tokens: int) -> float:
    submit(tokens, 1)
    return drain()


def _decode_s(engine: Engine, timed: Timed, rows: int) -> tuple[float, float]:
    """Return a step's time and the host's share of it, over those in which all rows decode."""
    while engine.step().num_step_tokens != rows:
        pass
    num_steps, began_s, timed.waited_s = 0, time.perf_counter(), 0.0
    while num_steps < 100:
        if engine.step().num_step_tokens != rows:
            raise AssertionError("others than decodes were measured")
        num_steps += 1
    taken_s = time.perf_counter() - began_s
    return taken_s / num_steps, (taken_s - timed.waited_s) / num_steps


def measure_peer(report: Report) -> None:
    """The same weights' shape and load through `transformers`' continuous batching."""
    import transformers  # noqa: PLC0415 - takes seconds, and only here

    model_config = transformers.AutoConfig.for_model(**LLAMA_8B)
    with torch.device(CUDA):
        model = transformers.AutoModelForCausalLM.from_config(
            model_config, dtype=BF16, attn_implementation="sdpa"
        ).eval()
    generation = transformers.GenerationConfig(
        max_new_tokens=128, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    for rows in (1, 64):
        chance = random.Random(rows)
        prompts = [[chance.randrange(128000) for _ in range(1024)] for _ in range(rows)]
        began_s = time.perf_counter()
        model.generate_batch(inputs=prompts, generation_config=generation)
        taken_s = time.perf_counter() - began_s
        report.add(f"transformers, {rows} x (1024 + 128)", rows * 128 / taken_s, "tokens/s")


def measure_limits(report: Report) -> None:
    """What shares are of."""
    report.add("copy", report.limits.copy_bytes_per_s / 1e12, "TB/s, read and written")
    report.add("matrix product", report.limits.flops / 1e12, "TFLOP/s")


SECTIONS: dict[str, Callable[[Report], None]] = {
    "limits": measure_limits,
    "attention": measure_attention,
    "engine": measure_engine,
    "peer": measure_peer,
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
    """Measure what is asked for, write as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budget-s", type=float, default=480.0)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    args = parser.parse_args()
    began_s = time.monotonic()
    name = torch.cuda.get_device_name()
    about = f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}, {args.commit}"
    report = Report()
    for section in args.only:
        if time.monotonic() - began_s > args.budget_s:
            report.failed(section, "no time left")
            continue
        try:
            SECTIONS[section](report)
        except Exception as error:  # noqa: BLE001 - the other sections are wanted all the same
            report.failed(section, f"{type(error).__name__}: {error}")
        torch.cuda.empty_cache()
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "gpu.json").write_text(json.dumps({"about": about, "rows": report.rows}))
        (args.out / "gpu.md").write_text(markdown(report.rows, about))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here")
    main()
