"""What every attention backend does, held against dense attention in float64.

The pool is full of NaN but for what a row may read, so that one read too many shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention.cpu import CpuAttention
from model.attention.flash import FlashAttention, FlashBatch
from model.attention.interface import AttentionBackend, AttentionBatch, AttentionSpec
from model.attention.reference import ReferenceAttention
from model.attention.torch_sdpa import TorchAttention
from model.attention.triton_attention import TritonAttention
from model.cpu.library import ISAS, load_cpu_library
from model.kv.format import float_format
from model.kv.pool import KVPool

CPU = torch.device("cpu")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
MIXED = ((1, 1), (1, 700), (40, 40), (37, 300), (1, 17), (2, 130), (1, 256), (1, 257))
#: As mixed, for what is interpreted: a hundred times slower than the slowest of the others.
SMALL = ((1, 1), (1, 130), (17, 17), (18, 70), (1, 64), (2, 66))
#: Relative to the largest value of the result.
TOLERANCE = {F32: 1e-5, F16: 2e-3, BF16: 1.6e-2}
#: Where operands enter as bfloat16, and sums are float32.
ROUNDED_TOLERANCE = 6e-3

Build = Callable[[AttentionSpec, KVPool], AttentionBackend]


def dense_kernel(
    q: Tensor, keys: Tensor, values: Tensor, batch: FlashBatch, scale: float, window: int | None
) -> Tensor:
    """What a FlashAttention kernel computes, for the parts of that backend that run on a CPU."""
    out = torch.empty_like(q)
    starts, ends = batch.cu_seqlens_q.tolist(), batch.seq_lens.tolist()
    assert batch.cu_seqlens_k.tolist() == [0, *torch.tensor(ends).cumsum(0).tolist()]
    for row, num_keys in enumerate(ends):
        pages = batch.block_table[row]
        mine = slice(starts[row], starts[row + 1])
        k = keys[pages].flatten(0, 1)[:num_keys]
        v = values[pages].flatten(0, 1)[:num_keys]
        out[mine] = dense(q[mine], k, v, scale, window).to(q.dtype)
    return out


def cpu(isa: str) -> Build:
    def build(spec: AttentionSpec, pool: KVPool) -> AttentionBackend:
        library = load_cpu_library(isa=isa)
        if isinstance(library, str):
            pytest.skip(library)
        return CpuAttention(spec, pool, library)

    return build


BACKENDS: dict[str, Build] = {
    "reference": ReferenceAttention,
    "torch": TorchAttention,
    "flash": lambda spec, pool: FlashAttention(spec, pool, dense_kernel),
    "triton": TritonAttention,
    **{f"cpu-{isa}": cpu(isa) for isa in ISAS},
}


#: Of our own kernels: where there is a GPU they are compiled, else interpreted.
TRITON_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend the last tokens of `[keys, kv_heads, head_dim]`, in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    scores = q.double().transpose(0, 1) @ k.transpose(1, 2) * scale
    back = torch.arange(k.shape[1] - len(q), k.shape[1])[:, None] - torch.arange(k.shape[1])
    hidden = (back < 0) | (back >= (window or 2**31))
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(hidden, -torch.inf).exp()
    # A sink is one more term of the sum that weights are divided by.
    total = weights.sum(-1, keepdim=True)
    total += 0.0 if sinks is None else sinks.double().exp()[:, None, None]
    return (weights / total @ v).transpose(0, 1)


@dataclass
class Scene:
    """A pool with the past of some rows in it, and the step that comes next."""

    spec: AttentionSpec
    pool: KVPool
    batch: AttentionBatch
    qkv: Tensor
    #: Of each row all keys and values, `[keys, kv_heads, head_dim]`, as the pool rounds them.
    history: list[tuple[Tensor, Tensor]]

    def on(self, device: torch.device) -> Scene:
        """The same on another device; what is expected stays where it is."""
        spec = replace(self.spec, device=device)
        pool = KVPool(self.pool.layout, self.pool.num_pages, device)
        for layer in range(spec.num_layers):
            for to, plane in zip(pool.pages(layer)[:2], self.pool.pages(layer)[:2], strict=True):
                to.copy_(plane)
        moved: Any = {
            field.name: value.to(device)
            for field in fields(self.batch)
            if isinstance(value := getattr(self.batch, field.name), Tensor)
        }
        return Scene(spec, pool, replace(self.batch, **moved), self.qkv.to(device), self.history)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        spec = self.spec
        last = spec.num_heads + spec.num_kv_heads
        return self.qkv[:, : spec.num_heads], self.qkv[:, spec.num_heads : last], self.qkv[:, last:]

    def expected(self, layer: int) -> Tensor:
        starts = self.batch.query_starts.tolist()
        q = self.parts[0].cpu()
        spec = self.spec
        sinks = None if spec.sinks is None else spec.sinks[layer]
        rows = [
            dense(
                q[starts[i] : starts[i + 1]],
                k,
                v,
                spec.scale,
                spec.windows[layer],
                spec.softcap,
                sinks,
            )
            for i, (k, v) in enumerate(self.history)
        ]
        return torch.cat(rows).flatten(1)


def make_scene(
    rows: tuple[tuple[int, int], ...],
    *,
    head_dim: int = 64,
    num_kv_heads: int = 3,
    group: int = 3,
    page_size: int = 16,
    dtype: torch.dtype = F32,
    kv_dtype: torch.dtype = F32,
    windows: tuple[int | None, ...] = (None,),
    seed: int = 0,
) -> Scene:
    """Rows are (tokens of this step, tokens in all)."""
    generator = torch.Generator().manual_seed(seed)
    spec = AttentionSpec(
        num_layers=len(windows),
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        windows=windows,
        dtype=dtype,
        kv_format=float_format(kv_dtype),
        device=CPU,
    )
    needs = [-(-end // page_size) for _, end in rows]
    pool = KVPool(spec.layout(page_size), sum(needs) + 2, CPU)
    shuffled = torch.randperm(pool.num_pages, generator=generator).int()
    # Past a row's need stands a page of nobody's, full of NaN as all of the pool.
    table = torch.full((len(rows), max(needs) + 2), int(shuffled[-1]), dtype=torch.int32)
    num_tokens = sum(count for count, _ in rows)
    qkv = torch.randn((num_tokens, num_kv_heads * (group + 2), head_dim), generator=generator).to(
        dtype
    )
    _, new_k, new_v = Scene(spec, pool, None, qkv, []).parts  # type: ignore[arg-type] # not yet
    planes = [pool.pages(layer)[:2] for layer in range(len(windows))]
    for plane in chain.from_iterable(planes):
        plane.fill_(torch.nan)
    positions, slots, history, done = [], [], [], 0
    for row, (count, end) in enumerate(rows):
        table[row, : needs[row]] = shuffled[: needs[row]]
        shuffled = shuffled[needs[row] :]
        at = torch.arange(end)
        slot = table[row, at // page_size].long() * page_size + at % page_size
        both = torch.randn(2, end, num_kv_heads, head_dim, generator=generator).to(kv_dtype)
        for keys, values in planes:
            keys.flatten(0, 1)[slot[:-count]] = both[0, :-count]
            values.flatten(0, 1)[slot[:-count]] = both[1, :-count]
        both[0, -count:] = new_k[done : done + count].to(kv_dtype)
        both[1, -count:] = new_v[done : done + count].to(kv_dtype)
        done += count
        positions.append(at[-count:])
        slots.append(slot[-count:])
        history.append((both[0], both[1]))
    counts = torch.tensor([0, *(count for count, _ in rows)])
    batch = AttentionBatch(
        query_starts=counts.cumsum(0).int(),
        seq_lens=torch.tensor([end for _, end in rows]).int(),
        block_table=table,
        positions=torch.cat(positions),
        kv_slots=torch.cat(slots),
        max_query_len=max(count for count, _ in rows),
        max_seq_len=max(end for _, end in rows),
    )
    return Scene(spec, pool, batch, qkv, history)


def poison_behind_window(scene: Scene, unit_tokens: int) -> None:
    """Give away the keys that no query of the step sees, in units of so many tokens.

    They become NaN, and pages without a key in view another page, which is full of NaN.
    """
    batch, page_size = scene.batch, scene.pool.layout.page_size
    window = scene.spec.widest_window
    assert window is not None, "a layer sees all keys"
    stranger = int(batch.block_table[0, -1])
    starts, ends = batch.query_starts.tolist(), batch.seq_lens.tolist()
    for row, end in enumerate(ends):
        first = max(end - (starts[row + 1] - starts[row]) - window + 1, 0)
        at = torch.arange(first // unit_tokens * unit_tokens)
        slots = batch.block_table[row, at // page_size].long() * page_size + at % page_size
        for layer in range(scene.spec.num_layers):
            for plane in scene.pool.pages(layer)[:2]:
                plane.flatten(0, 1)[slots] = torch.nan
        batch.block_table[row, : first // page_size] = stranger


def bits(pages: Tensor) -> Tensor:
    """So that NaN equals NaN."""
    return pages.view(torch.int32 if pages.dtype == F32 else torch.int16)


def is_slow(build: Build) -> bool:
    """Whether it is interpreted."""
    return build is TritonAttention and TRITON_DEVICE == CPU


def mixed(build: Build) -> tuple[tuple[int, int], ...]:
    return SMALL if is_slow(build) else MIXED


def placed(build: Build, scene: Scene) -> Scene:
    """The scene where the backend can see it."""
    return scene.on(TRITON_DEVICE) if build is TritonAttention else scene


def check(build: Build, scene: Scene) -> None:
    scene = placed(build, scene)
    backend = build(scene.spec, scene.pool)
    backend.plan(scene.batch)
    q, k, v = scene.parts
    for layer in range(scene.spec.num_layers):
        pages = scene.pool.pages(layer)[:2]
        wanted = [page.clone() for page in pages]
        for page, new in zip(wanted, (k, v), strict=True):
            page.flatten(0, 1)[scene.batch.kv_slots] = new.to(page.dtype)
        result = backend.attend(layer, q, k, v)
        for page, want in zip(pages, wanted, strict=True):
            assert torch.equal(bits(page), bits(want)), "wrote elsewhere than its own slots"
        expected = scene.expected(layer)
        assert result.dtype == scene.spec.dtype
        assert result.shape == expected.shape
        assert result.isfinite().all(), "read what is not its own"
        error = (result.cpu().double() - expected).abs().max() / expected.abs().max()
        allowed = TOLERANCE[scene.spec.dtype]
        if isinstance(backend, CpuAttention) and backend.is_rounded:
            allowed = max(allowed, ROUNDED_TOLERANCE)
        assert error < allowed, f"off by {error:.2g}"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads change no bits (`test_cpu.py`), and waiting for each other takes them long here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=BACKENDS)
def build(request: pytest.FixtureRequest) -> Build:
    return BACKENDS[request.param]


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("kv_dtype", [F32, F16, BF16], ids=str)
def test_heads_and_pages_of_many_sizes(
    build: Build, head_dim: int, kv_dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["build"]
    heads = ((3, 3), (1, 1), (2, 4), (1, 8))
    for seed, page_size in enumerate((1, 16, 256)):
        if is_slow(build) and (seed + head_dim // 16 + kv_dtype.itemsize) % 3:
            continue
        kv_heads, group = heads[(seed + head_dim // 16) % 4]
        check(
            build,
            make_scene(
                mixed(build),
                head_dim=head_dim,
                num_kv_heads=kv_heads,
                group=group,
                page_size=page_size,
                # Those kernels want one dtype of queries and pages.
                dtype=kv_dtype if name == "flash" else F32,
                kv_dtype=kv_dtype,
                seed=seed,
            ),
        )


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_activations_of_half_precision(build: Build, dtype: torch.dtype) -> None:
    check(build, make_scene(mixed(build), dtype=dtype, kv_dtype=dtype))


def test_each_layer_has_its_own_window(build: Build) -> None:
    windows = (None, 1, 30, 200) if is_slow(build) else (None, 1, 100, 256, None, 1000)
    check(build, make_scene(mixed(build), windows=windows))


@pytest.mark.parametrize("page_size", [1, 16, 48, 64])
@pytest.mark.parametrize("kv_dtype", [F32, F16, BF16], ids=str)
def test_no_key_behind_the_window_is_read(
    build: Build, page_size: int, kv_dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """Prefill chunks and decodes; the pages there may be given back, and be another sequence's."""
    is_flash = request.node.callspec.params["build"] == "flash"
    rows = ((1, 130), (18, 70), (2, 66), (1, 9)) if is_slow(build) else (*MIXED, (64, 2100))
    scene = make_scene(
        rows,
        page_size=page_size,
        windows=(9, 40) if is_slow(build) else (1, 100, 256, 63),
        dtype=kv_dtype if is_flash else F32,
        kv_dtype=kv_dtype,
    )
    # FlashAttention loads whole tiles: in the page where the window begins the keys must be finite.
    poison_behind_window(scene, page_size if is_flash else 1)
    check(build, scene)


@pytest.mark.parametrize("build", [ReferenceAttention, TorchAttention])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_capped_scores_and_sinks(build: Build, softcap: float | None, has_sinks: bool) -> None:
    scene = make_scene(MIXED, windows=(None, 9))
    sinks = torch.tensor([[0.0, 1.0, -2.0] * 3, [3.0, 5.0, -torch.inf] * 3])
    spec = replace(scene.spec, softcap=softcap, sinks=tuple(sinks) if has_sinks else None)
    check(build, replace(scene, spec=spec))
    assert bool(spec.beyond_softmax) == (has_sinks or softcap is not None)


def test_a_single_token(build: Build) -> None:
    check(build, make_scene(((1, 1),)))


@pytest.mark.parametrize("window", [None, 300])
def test_decode_far_into_a_sequence(build: Build, window: int | None) -> None:
    check(build, make_scene(((1, 5003),), windows=(window,)))


def test_prefill_chunk_far_into_a_sequence(build: Build) -> None:
    check(build, make_scene(((64, 2100),), windows=(None, 70)))


def test_a_second_step_replaces_the_first(build: Build) -> None:
    scene = placed(build, make_scene(mixed(build)))
    backend = build(scene.spec, scene.pool)
    backend.plan(placed(build, make_scene(((5, 9),))).batch)
    backend.plan(scene.batch)
    result = backend.attend(0, *scene.parts).cpu()
    torch.testing.assert_close(result.double(), scene.expected(0), rtol=1e-4, atol=1e-5)


@settings(max_examples=20)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, 90), st.integers(0, 600)).map(lambda r: (r[0], sum(r)))
        | st.integers(1, 600).map(lambda end: (1, end)),
        min_size=1,
        max_size=6,
    ),
    page_size=st.sampled_from([1, 3, 16, 64]),
    heads=st.sampled_from([(1, 1), (2, 5), (1, 9), (2, 7)]),
    window=st.none() | st.integers(1, 400),
    is_poisoned=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_ragged_batch(
    rows: list[tuple[int, int]],
    page_size: int,
    heads: tuple[int, int],
    window: int | None,
    is_poisoned: bool,
    seed: int,
) -> None:
    isas = [isa for isa in ISAS[:-1] if not isinstance(load_cpu_library(isa=isa), str)]
    for name in ("torch", *(f"cpu-{isa}" for isa in isas)):
        scene = make_scene(
            tuple(rows),
            head_dim=32,
            num_kv_heads=heads[0],
            group=heads[1],
            page_size=page_size,
            windows=(window,),
            seed=seed,
        )
        if is_poisoned and window:
            poison_behind_window(scene, 1)
        check(BACKENDS[name], scene)
