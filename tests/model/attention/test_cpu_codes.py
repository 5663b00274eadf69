"""Pages of codes on every instruction set: the bytes that are written, and the reach of a NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention_scenes import Scene, make_scene, planes_of
from model.attention.cpu import CpuAttention
from model.cpu.instruction_sets import ISAS
from model.cpu.library import CpuLibrary, load_cpu_library
from model.kv.format import CODED_FORMATS, KVFormat

FORMATS = pytest.mark.parametrize("kv_format", CODED_FORMATS, ids=lambda one: one.name)


@pytest.fixture(scope="module", params=ISAS)
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    library = load_cpu_library(isa=request.param)
    if isinstance(library, str):
        pytest.skip(library)
    return library


def vectors(dim: int) -> Tensor:
    """Return float32 vectors `[count, dim]` of all kinds that have a rule of their own."""
    generator = torch.Generator().manual_seed(1)

    def normal(count: int) -> Tensor:
        return torch.randn(count, dim, generator=generator)

    sizes = 10.0 ** torch.arange(-44, 38, 3)
    large_channel, nan, infinite = normal(4), normal(2), normal(3)
    large_channel[:, 3] *= 20
    nan[:, 5], infinite[0, 0], infinite[1, -1], infinite[2, 7:9] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        3e38,
    )
    infinite[2, 8] = -torch.inf
    # Ties between two codes, at a scale of one.
    halves = torch.arange(dim).float() - dim // 2 + 0.5
    halves[0] = 127
    return torch.cat(
        [
            normal(40),
            normal(len(sizes)) * sizes[:, None],
            torch.full((3, dim), 1e38) * torch.tensor([1.0, -1.0, 3.0])[:, None],
            torch.zeros(1, dim),
            -torch.zeros(1, dim),
            torch.ones(2, dim) * torch.tensor([[0.37], [-5.0]]),
            torch.eye(dim)[:2] * torch.tensor([[1.0], [-2.0]]),
            halves[None],
            *(large_channel, nan, infinite),
        ]
    )


def attend(library: CpuLibrary, scene: Scene, qkv: Tensor) -> Tensor:
    backend = CpuAttention(scene.spec, scene.pool, library)
    backend.plan(scene.batch)
    last = scene.spec.num_heads + scene.spec.num_kv_heads
    return backend.attend(
        0, qkv[:, : scene.spec.num_heads], qkv[:, scene.spec.num_heads : last], qkv[:, last:]
    )


@FORMATS
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, torch.float32), (80, torch.float32), (128, torch.bfloat16)],
    ids=str,
)
def test_codes_and_scales_are_those_of_the_definition(
    library: CpuLibrary, kv_format: KVFormat, head_dim: int, dtype: torch.dtype
) -> None:
    rows = vectors(head_dim).to(dtype)
    count = len(rows)
    scene = make_scene(
        ((count, count),),
        head_dim=head_dim,
        num_kv_heads=1,
        group=1,
        dtype=dtype,
        kv_format=kv_format,
    )
    keys, values = rows[:, None], rows.flip(0)[:, None]
    attend(library, scene, torch.cat([torch.ones_like(keys), keys, values], 1))
    found = [plane.clone() for plane in planes_of(scene.pool.pages(0))]
    scene.pool.store(0, scene.batch.kv_slots, keys, values)
    for plane, wanted in zip(found, planes_of(scene.pool.pages(0)), strict=True):
        assert torch.equal(plane.view(torch.uint8), wanted.view(torch.uint8))


@FORMATS
@pytest.mark.parametrize("group", [2, 20])
def test_what_is_no_number_harms_no_token_before_it(
    library: CpuLibrary, kv_format: KVFormat, group: int
) -> None:
    scene = make_scene(((30, 300),), num_kv_heads=1, group=group, kv_format=kv_format)
    clean = attend(library, scene, scene.qkv)
    for part in (0, group, group + 1):
        qkv = scene.qkv.clone()
        qkv[17, part, 3] = torch.nan
        found = attend(library, scene, qkv)
        assert torch.equal(found[:17], clean[:17])
        assert not found[17, :64].isfinite().any()
        # A query is its own head's alone.
        assert found[17, 64:].isfinite().all() == (part == 0)
        assert found[18:].isfinite().all() == (part == 0)
