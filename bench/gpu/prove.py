"""Checks the code for CUDA on a GPU: kernels, operations, and the same tokens as on a CPU.

`python bench/gpu/prove.py`: one line a check, exit status 1 if one fails. Takes a minute or two.
`--device cpu` rehearses it without a GPU: see `cases.py`.

Two runs give the same tokens only if their steps have the same rows. Products of other numbers of
rows add in another order (float32 ones of 1 to 3 rows on a CPU, many on a GPU), which can turn a
near tie. The scheduler sizes steps by measured times, so here its clock counts instead.
"""

# ruff: noqa: T201 - printing is its only purpose

from __future__ import annotations

import argparse
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cases import REHEARSAL, Case, case_of
from scenes import BF16, Scene, close

from cache.view import View
from configs.schema import CacheSection, ModelSection, OctavoConfig, SchedulerSection
from model import build
from model.attention.interface import FEW_QUERIES
from model.attention.registry import choose_backend
from model.cuda.coded_linear import pack_codes
from model.cuda.ops import GpuOps
from model.interface import SamplingParams
from model.kv.format import CODED_FORMATS, KV_FORMATS
from model.ops import Ops, TorchOps
from model.weights.checkpoints.coded_matrix import CodedMatrix
from scheduler.engine import Engine
from scheduler.messages import GenerateRequest, Submit

DECODES = ((1, 1), (1, 64), (1, 65), (1, 1000), (1, 5003))
#: Rows of a token and its draft.
DRAFTS = ((8, 8), (3, 64), (1, 65), (5, 1000), (8, 5003))
MIXED = ((1, 300), (1, 17), (200, 200), (129, 700), (2, 64))
#: Of rows: both kernels meet the first position in view, and a tile with the last sinks in it.
VIEWS = (View(4, 60), View(70, 630), View(0, 64))
#: In whose pages the bits of rows are compared.
ROW_FORMATS = ("bfloat16", "int8", "int4")
#: Of the whole engine: settings of the pages, and of drafts.
RUNS: tuple[tuple[str, dict[str, str], str], ...] = (
    ("floats", {}, "none"),
    ("with drafts", {}, "auto"),
    ("in view", {"kv_policy": "sinks:4+64"}, "none"),
    ("int8 pages in view", {"kv_cache_dtype": "int8", "kv_policy": "sinks:4+64"}, "none"),
)
#: The model whose tokens are compared.
TINY = REHEARSAL.path


def attention_checks(case: Case) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield checks of each backend, at sizes for all of its paths, also replayed from a graph."""
    kinds = (("decode", DECODES), ("draft", DRAFTS), ("mixed", MIXED))
    variants = itertools.product(kinds, (64, 128), case.pages, (None, 100))
    for (kind, rows), head_dim, page_size, window in variants:
        scene = Scene(rows, head_dim, page_size, window)
        for name in case.backends:

            def check(scene: Scene = scene, name: str = name, kind: str = kind) -> str:
                results = close(scene.found(name, case)[0], scene.wanted[0])
                if kind != "mixed":
                    replayed, _ = scene.found(name, case, is_recorded=True)
                    results += "; replayed " + close(replayed, scene.wanted[0])
                return results

            yield f"attention {name} {kind} head {head_dim} page {page_size} window {window}", check


def format_checks(case: Case) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield checks of pages of codes: the bytes of the oracle, and results from them."""
    kinds = (("draft", DRAFTS), ("mixed", MIXED))
    for kv_format, (kind, rows) in itertools.product(CODED_FORMATS, kinds):
        scene = Scene(rows, 128, 16, kv_format=kv_format)

        def check(scene: Scene = scene) -> str:
            result, planes = scene.found(case.backends[-1], case)
            wanted, wanted_planes = scene.wanted
            for plane, one in zip(planes, wanted_planes, strict=True):
                if num_wrong := int((plane != one).sum()):
                    raise AssertionError(f"{num_wrong} of {plane.numel()} bytes differ")
            return close(result, wanted) + "; bytes equal"

        yield f"pages of {kv_format.name} {kind}", check


def view_checks(case: Case) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield checks of rows with views of their own, over floats and codes."""
    kinds = (("draft", DRAFTS), ("mixed", MIXED))
    formats = (None, *CODED_FORMATS)
    for kv_format, view, (kind, rows) in itertools.product(formats, VIEWS, kinds):
        scene = Scene(rows, 128, 16, kv_format=kv_format, view=view)

        def check(scene: Scene = scene, kind: str = kind) -> str:
            name, wanted = case.backends[-1], scene.wanted[0]
            result = close(scene.found(name, case)[0], wanted)
            if kind == "mixed":
                return result
            replayed, _ = scene.found(name, case, is_recorded=True)
            return f"{result}; replayed {close(replayed, wanted)}"

        format_name = kv_format.name if kv_format else "floats"
        yield f"view {view.sinks}+{view.window} {format_name} {kind}", check


def check_rows(case: Case, format_name: str) -> str:
    """Check that in Triton's kernels a query has the same bits alone and in a row of several."""
    num_rows, end = 8, 5003
    kv_format = KV_FORMATS[format_name]
    scene = Scene(((FEW_QUERIES, end),) * num_rows, 128, 16, kv_format=kv_format)
    spec, pool, batch = scene.on(case.device, BF16)
    backend = choose_backend(case.backends[-1], spec).build(spec, pool)
    q, k, v = scene.split(case.device, BF16)
    backend.plan(batch)
    together = backend.attend(0, q, k, v).view(num_rows, FEW_QUERIES, -1)
    for place in range(FEW_QUERIES):
        mine = slice(place, None, FEW_QUERIES)
        # As in a graph, the longest row stays the same, and with it the number of splits.
        alone = replace(
            batch,
            query_starts=batch.query_starts // FEW_QUERIES,
            seq_lens=batch.seq_lens - (FEW_QUERIES - 1 - place),
            positions=batch.positions[mine],
            kv_slots=batch.kv_slots[mine],
            max_query_len=1,
        )
        backend.plan(alone)
        found = backend.attend(0, q[mine], k[mine], v[mine])
        if case.device.type == "cuda" and not torch.equal(found, together[:, place]):
            raise AssertionError(f"query {place} of a row differs")
        close(found, together[:, place])
    return "to the bit"


def check_ops(case: Case) -> str:
    """Compare our operations with torch's on the GPU, where both round alike."""
    device = case.device
    ours: Ops = GpuOps() if device.type == "cuda" else TorchOps()
    plain: Ops = TorchOps()
    x = torch.randn(300, 4096, device=device, dtype=BF16)
    weight = torch.randn(4096, device=device)
    residuals = [torch.ones(300, 4096, device=device) for _ in range(2)]
    normed = [
        ops.add_rms_norm(x, residual, weight, 1e-5, BF16)
        for ops, residual in zip((ours, plain), residuals, strict=True)
    ]
    results = [close(normed[0], normed[1]), close(residuals[0], residuals[1], 1e-6)]
    results.append(close(ours.silu_and_mul(x), plain.silu_and_mul(x)))
    turned = []
    for ops in (ours, plain):
        qk = torch.randn(300, 40, 128, generator=torch.Generator().manual_seed(1)).to(device, BF16)
        positions = torch.arange(300, device=device)
        cos_sin = torch.randn(300, 128, generator=torch.Generator().manual_seed(2)).to(device)
        ops.apply_rope(qk[:, :32], qk[:, 32:], positions, cos_sin)
        turned.append(qk)
    results.append(close(turned[0], turned[1]))
    return ", ".join(results)


def check_codes(case: Case) -> str:
    """Compare products from codes with products of their values, for one row and for many."""
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(0, 256, (640, 4096), generator=generator, dtype=torch.uint8)
    scales = torch.rand(640, 32, generator=generator) + 0.1
    zeros = torch.randint(0, 16, (640, 32), generator=generator).float()
    floats = torch.randn(640, 4096, generator=generator).to(torch.float8_e4m3fn)
    results = []
    for matrix in (
        CodedMatrix(integers & 15, scales, zeros, (1, 128), 4),
        CodedMatrix(integers.view(torch.int8), scales[:, :1], None, (1, 4096), 8),
        CodedMatrix(floats, scales[:5], None, (128, 128), 8),
    ):
        values = torch.cat(list(matrix.rows())).double()
        for rows in (1, 300):
            x = torch.randn(rows, 4096, generator=generator).to(BF16)
            if case.device.type == "cuda":
                linear = pack_codes([matrix], None, BF16, case.device)
                assert linear is not None
                found = linear(x.to(case.device)).cpu()
            else:
                # The kernel is in Triton: the rehearsal has the values alone.
                found = x.float() @ values.float().T
            results.append(close(found, x.double() @ values.T))
    return ", ".join(results)


def tokens_of(
    device: str, backend: str, speculation: str = "none", **cache: str
) -> list[list[int]]:
    """Return the answers of a small model in float32 to concurrent requests.

    The clock advances at each reading, so that the steps do not depend on the machine's load.
    """
    config = OctavoConfig(
        model=ModelSection.model_validate(
            {
                "device": device,
                "dtype": "float32",
                "quantization": "none",
                "attention_backend": backend,
            }
        ),
        cache=CacheSection.model_validate(cache),
        scheduler=SchedulerSection.model_validate(
            {
                "max_num_seqs": 9,
                "max_num_batched_tokens": 64,
                "speculation": speculation,
                "debug": True,
            }
        ),
    )
    runner = build.make_runner(build.resolve_source(f"dummy:{TINY}"), config)
    ticks = itertools.count(1.0)
    policy = config.cache.policy
    view = View(policy.sinks, policy.window or None)
    engine = Engine(runner, config.scheduler, lambda: next(ticks), lambda _: None)
    tokens: list[list[int]] = [[] for _ in range(9)]
    for number in range(9):
        params = SamplingParams(
            max_tokens=40,
            temperature=float(number % 2),
            top_p=0.9 if number % 3 == 0 else 1.0,
            repetition_penalty=1.2 if number == 4 else 1.0,
            logprobs=2 if number == 5 else None,
            seed=number,
            ignore_eos=True,
        )
        prompt = tuple(3 + (7 * number + at) % 500 for at in range(1 + 12 * number))
        engine.handle(Submit(number, GenerateRequest(prompt, params, view=view)))
    while engine.has_work:
        result = engine.step()
        for number, token in zip(result.request_ids, result.token_ids, strict=True):
            tokens[number].append(token)
    engine.check()
    engine.close()
    return tokens


def check_tokens(case: Case) -> str:
    """Check that graphs, padding, overlap, drafts and sampling give the tokens of a CPU."""
    # In float32, which the last of them can do.
    device, backend = case.device.type, case.backends[-1]
    if tokens_of(device, backend) != tokens_of(device, backend):
        raise AssertionError("a second run gives other tokens")
    results, wanted = [], list[list[int]]()
    for name, cache, speculation in RUNS:
        # Drafts change no token.
        if speculation == "none":
            wanted = tokens_of("cpu", "reference", **cache)
        tokens = tokens_of(device, backend, speculation, **cache)
        same = sum(a == b for a, b in zip(wanted, tokens, strict=True))
        firsts = sum(a[0] == b[0] for a, b in zip(wanted, tokens, strict=True))
        results.append(f"{name}: {same} of 9 requests alike")
        # Sums in another order may turn a near tie: a mistake would turn nearly all.
        if firsts < 8 or same < 7:
            raise AssertionError(f"{results[-1]}, {firsts} of their first tokens")
    return ", ".join(results)


def main() -> int:
    """Run all checks; a failure does not keep the others from running."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    case = case_of(parser.parse_args().device)
    torch.backends.cuda.matmul.allow_tf32 = False
    checks: list[tuple[str, Callable[[], str]]] = [
        *attention_checks(case),
        *format_checks(case),
        *view_checks(case),
        *((f"rows {name}", partial(check_rows, case, name)) for name in ROW_FORMATS),
        ("operations", partial(check_ops, case)),
        ("codes", partial(check_codes, case)),
        ("tokens", partial(check_tokens, case)),
    ]
    num_failed = 0
    for name, check in checks:
        try:
            print(f"ok      {name}: {check()}", flush=True)
        except Exception as error:  # noqa: BLE001 - any error is the finding
            num_failed += 1
            print(f"FAILED  {name}: {type(error).__name__}: {error}", flush=True)
            traceback.print_exc()
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
