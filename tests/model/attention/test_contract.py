"""The contract of all attention backends, tested against dense attention in float64.

The pool is NaN except for the keys and values that a row may read, so any other read is visible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_scenes import CPU, Scene, dense, make_scene, planes_of, poison
from model.attention.cpu import CpuAttention
from model.attention.flash import FlashAttention, FlashCall
from model.attention.interface import AttentionBackend, AttentionSpec
from model.attention.reference import ReferenceAttention
from model.attention.torch_sdpa import TorchAttention
from model.attention.triton_attention import TritonAttention
from model.cpu.instruction_sets import ISAS
from model.cpu.library import load_cpu_library
from model.kv.format import CODED_FORMATS, FLOAT_FORMATS, KVFormat
from model.kv.pool import KVPool

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
MIXED = ((1, 1), (1, 700), (40, 40), (37, 300), (1, 17), (2, 130), (1, 256), (1, 257))
#: As MIXED, for interpreted kernels: a hundred times slower than the slowest of the others.
SMALL = ((1, 1), (1, 130), (17, 17), (18, 70), (1, 64), (2, 66))
#: As SMALL, where they write codes, too.
CODED_SMALL = ((1, 70), (9, 40), (3, 66))
#: Relative to the largest value of the result.
TOLERANCE = {F32: 1e-5, F16: 2e-3, BF16: 1.6e-2}
#: Where operands enter as bfloat16, and sums are float32.
ROUNDED_TOLERANCE = 6e-3

#: The backends that read pages of codes.
READERS_OF_CODES = ("reference", "torch", "triton", *(f"cpu-{isa}" for isa in ISAS))

Build = Callable[[AttentionSpec, KVPool], AttentionBackend]


def dense_kernel(call: FlashCall) -> Tensor:
    """Compute as a FlashAttention kernel, for the parts of that backend that run on a CPU."""
    q, keys, values, batch, cu_seqlens_k, scale, window = call
    out = torch.empty_like(q)
    starts, ends = batch.query_starts.tolist(), batch.seq_lens.tolist()
    assert cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_k.tolist() == [0, *torch.tensor(ends).cumsum(0).tolist()]
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
            poison(scene.pool.pages(layer), slots)
        batch.block_table[row, : first // page_size] = stranger


def bits(pages: Tensor) -> Tensor:
    """Return the bits as integers, so that NaN equals NaN."""
    return pages.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[pages.dtype.itemsize])


def is_slow(build: Build) -> bool:
    """Return whether a backend is interpreted."""
    return build is TritonAttention and TRITON_DEVICE == CPU


def mixed(build: Build) -> tuple[tuple[int, int], ...]:
    return SMALL if is_slow(build) else MIXED


def few(build: Build) -> dict[str, Any]:
    """Return few heads for interpreted kernels, whose programs have one head each."""
    return {"num_kv_heads": 1, "group": 2} if is_slow(build) else {}


def placed(build: Build, scene: Scene) -> Scene:
    """Return the scene on the backend's device."""
    return scene.on(TRITON_DEVICE) if build is TritonAttention else scene


def check(build: Build, scene: Scene) -> None:
    scene = placed(build, scene)
    backend = build(scene.spec, scene.pool)
    backend.plan(scene.batch)
    q, k, v = scene.parts
    encode = scene.spec.kv_format.encode
    stored = chain.from_iterable(zip(encode(k), encode(v), strict=True))
    new = [bits(plane) for plane in stored]
    for layer in range(scene.spec.num_layers):
        planes = [bits(plane) for plane in planes_of(scene.pool.pages(layer))]
        wanted = [plane.clone() for plane in planes]
        for plane, one in zip(wanted, new, strict=True):
            plane.flatten(0, 1)[scene.batch.kv_slots] = one
        result = backend.attend(layer, q, k, v)
        for plane, want in zip(planes, wanted, strict=True):
            assert torch.equal(plane, want), "wrote other bytes, or elsewhere than its own slots"
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


_HEAD_DIMS, _KV_DTYPES = (32, 64, 80, 96, 128, 256), (F32, F16, BF16)


@pytest.mark.parametrize("head_dim", _HEAD_DIMS)
@pytest.mark.parametrize("kv_dtype", _KV_DTYPES, ids=str)
def test_heads_and_pages_of_many_sizes(
    build: Build, head_dim: int, kv_dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["build"]
    heads = ((3, 3), (1, 1), (2, 4), (1, 8))
    place = _HEAD_DIMS.index(head_dim)
    for seed, page_size in enumerate((1, 16, 256)):
        # Each size with one dtype, and with one size of pages.
        if is_slow(build) and (seed, kv_dtype) != (place // 2, _KV_DTYPES[place % 3]):
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
    check(build, make_scene(mixed(build), dtype=dtype, kv_dtype=dtype, **few(build)))


@pytest.mark.parametrize("name", READERS_OF_CODES)
@pytest.mark.parametrize("kv_format", CODED_FORMATS, ids=lambda one: one.name)
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (80, 1), (128, 48)])
def test_codes(name: str, kv_format: KVFormat, head_dim: int, page_size: int) -> None:
    build = BACKENDS[name]
    if is_slow(build) and (CODED_FORMATS.index(kv_format) - head_dim // 32) % 3:
        pytest.skip("another format has this size")
    scene = make_scene(
        CODED_SMALL if is_slow(build) else MIXED,
        head_dim=head_dim,
        num_kv_heads=1 if is_slow(build) else 3,
        page_size=page_size,
        kv_format=kv_format,
        windows=(None, 9) if is_slow(build) else (None, 100),
    )
    check(build, scene)


@pytest.mark.parametrize("name", READERS_OF_CODES)
@pytest.mark.parametrize("kv_format", CODED_FORMATS, ids=lambda one: one.name)
def test_no_code_behind_the_window_is_read(name: str, kv_format: KVFormat) -> None:
    build = BACKENDS[name]
    rows = CODED_SMALL if is_slow(build) else (*MIXED, (64, 600))
    heads = 1 if is_slow(build) else 3
    scene = make_scene(rows, num_kv_heads=heads, kv_format=kv_format, windows=(9, 40))
    poison_behind_window(scene, 1)
    check(build, scene)


@pytest.mark.parametrize("name", READERS_OF_CODES)
@pytest.mark.parametrize("kv_format", CODED_FORMATS, ids=lambda one: one.name)
def test_a_key_that_is_not_finite_harms_its_own_row_alone(name: str, kv_format: KVFormat) -> None:
    scene = placed(BACKENDS[name], make_scene(((1, 20), (1, 33)), kv_format=kv_format))
    backend = BACKENDS[name](scene.spec, scene.pool)
    backend.plan(scene.batch)
    q, k, v = scene.parts
    k[0, 1, 5] = torch.inf
    heads = backend.attend(0, q, k, v).view(2, scene.spec.num_kv_heads, -1).isfinite()
    assert heads.all(-1).tolist() == [[True, False, True], [True, True, True]]


@pytest.mark.parametrize("name", ["reference", "torch", "flash", "triton"])
def test_a_later_key_that_is_not_finite_harms_no_earlier_query_of_its_row(name: str) -> None:
    """As of a draft, or of a prompt: in pages of floats, and of codes where they are read."""
    build, formats = BACKENDS[name], [FLOAT_FORMATS[0]]
    if name in READERS_OF_CODES:
        formats.append(CODED_FORMATS[0])
    rows, lost = ((3, 20), (12, 30)), (2, 8)
    values = ((1, torch.nan), (2, torch.nan), (2, torch.inf))
    for kv_format, (place, value) in product(formats, values):
        scene = placed(build, make_scene(rows, head_dim=32, num_kv_heads=1, kv_format=kv_format))
        backend = build(scene.spec, scene.pool)
        backend.plan(scene.batch)
        for token in lost:
            scene.parts[place][token, 0, 5 + token] = value
        found = backend.attend(0, *scene.parts).isfinite()
        wanted = [token < 2 or 3 <= token < 8 for token in range(15)]
        assert found.all(-1).tolist() == wanted, (kv_format.name, place, value)


def test_each_layer_has_its_own_window(build: Build) -> None:
    windows = (None, 1, 30, 200) if is_slow(build) else (None, 1, 100, 256, None, 1000)
    check(build, make_scene(mixed(build), windows=windows, **few(build)))


#: Each size with each dtype; for interpreted kernels each size with one.
_PAGE_SIZES = (1, 16, 48, 64)


@pytest.mark.parametrize("page_size", _PAGE_SIZES)
@pytest.mark.parametrize("kv_dtype", _KV_DTYPES, ids=str)
def test_no_key_behind_the_window_is_read(
    build: Build, page_size: int, kv_dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """Prefill chunks and decodes; the pages there may be given back, and be another sequence's."""
    is_flash = request.node.callspec.params["build"] == "flash"
    if is_slow(build) and (_PAGE_SIZES.index(page_size) - _KV_DTYPES.index(kv_dtype)) % 3:
        pytest.skip("another dtype has this size")
    rows = ((1, 130), (18, 70), (2, 66), (1, 9)) if is_slow(build) else (*MIXED, (64, 600))
    scene = make_scene(
        rows,
        page_size=page_size,
        windows=(9, 40) if is_slow(build) else (1, 100, 256, 63),
        dtype=kv_dtype if is_flash else F32,
        kv_dtype=kv_dtype,
        **few(build),
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
    check(build, make_scene(((1, 5003),), windows=(window,), **few(build)))


def test_prefill_chunk_far_into_a_sequence(build: Build) -> None:
    check(build, make_scene(((64, 2100),), windows=(None, 70), **few(build)))


def test_a_second_step_replaces_the_first(build: Build) -> None:
    scene = placed(build, make_scene(mixed(build), **few(build)))
    backend = build(scene.spec, scene.pool)
    backend.plan(placed(build, make_scene(((5, 9),), **few(build))).batch)
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
