"""The kernel that writes codes, byte by byte against the definition in torch.

Interpreted where there is no GPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attention_scenes import make_scene, planes_of
from model.attention.triton_attention import TritonAttention
from model.kv.codes import hadamard
from model.kv.format import KV_FORMATS
from model.kv.pool import KVPool

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def special_vectors(dim: int) -> Tensor:
    """Return `[vectors, dim]`, each with a scale or a rounding that is a case of its own."""
    draw = torch.Generator().manual_seed(4)
    normal, spread = torch.randn(8, dim, generator=draw), torch.rand(8, dim, generator=draw)
    halves = torch.arange(dim) / 2 - dim / 4
    large = normal[:2].clone()
    large[:, 17] *= 20
    infinite, missing = normal[:2].clone(), normal[:1].clone()
    infinite[0, 5], infinite[1, 6] = torch.inf, -torch.inf
    missing[0, dim - 1] = torch.nan
    vectors = (
        normal,
        # Of many magnitudes: in 8-bit floats some are small multiples of the least.
        normal * 10 ** (-6 * spread),
        # Ties between two codes.
        halves.index_fill(0, torch.tensor(0), 127.0)[None],
        halves.index_fill(0, torch.tensor(0), 448.0)[None],
        halves[None],
        normal[:1].abs() + 3,
        large,
        torch.full((2, dim), -3.3) * torch.tensor([[1.0], [-7.0]]),
        torch.zeros(1, dim),
        torch.zeros(1, dim).index_fill(1, torch.tensor([3, 9]), -0.0),
        infinite,
        missing,
    )
    return torch.cat(vectors)


@pytest.mark.parametrize(("name", "head_dim"), [("int8", 80), ("fp8", 64), ("int4", 80)])
def test_codes_and_scales_are_the_bytes_of_the_definition(name: str, head_dim: int) -> None:
    kv_format, vectors = KV_FORMATS[name], special_vectors(head_dim)
    scene = make_scene(((len(vectors), len(vectors)),), head_dim=head_dim, kv_format=kv_format)
    spec = replace(scene.spec, num_heads=2, num_kv_heads=2, device=DEVICE)
    batch = scene.on(DEVICE).batch
    k = torch.stack((vectors, vectors.flip(0)), 1).to(DEVICE)
    planes = []
    for is_ours in (False, True):
        pool = KVPool(spec.layout(16), scene.pool.num_pages, DEVICE)
        for plane in planes_of(pool.pages(0)):
            plane.zero_()
        backend = TritonAttention(spec, pool)
        backend.plan(batch)
        if is_ours:
            backend.store(0, k, -k)
        else:
            pool.store(0, batch.kv_slots, k, -k)
        planes.append([plane.view(torch.uint8) for plane in planes_of(pool.pages(0))])
    for wanted, found in zip(*planes, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(("heads", "head_dim"), [((1, 3), 80), ((3, 3), 32)])
def test_rotated_queries_have_the_bits_of_the_definition(
    heads: tuple[int, int], head_dim: int
) -> None:
    """Products of matrices have other bits beside other vectors."""
    kv_heads, group = heads
    scene = make_scene(
        ((2, 5), (1, 3)),
        head_dim=head_dim,
        num_kv_heads=kv_heads,
        group=group,
        kv_format=KV_FORMATS["int8"],
    ).on(DEVICE)
    q = scene.parts[0]
    found = TritonAttention(scene.spec, scene.pool)._rotated(q)
    assert torch.equal(found, hadamard(q))
