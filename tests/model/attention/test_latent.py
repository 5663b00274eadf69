"""Attention whose values are the first elements of its keys, against dense attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attention_scenes import CPU, dense, make_scene
from model.attention import cpu, flash, triton_attention
from model.attention.cpu import CpuAttention
from model.attention.interface import AttentionBackend, AttentionSpec
from model.attention.reference import ReferenceAttention
from model.attention.registry import choose_backend
from model.attention.torch_sdpa import TorchAttention
from model.cpu.instruction_sets import ISAS
from model.cpu.library import load_cpu_library
from model.kv.format import KV_FORMATS
from model.kv.pool import KVPool

ROWS = ((1, 1), (1, 300), (40, 40), (17, 130), (1, 17), (1, 257))
LATENT_DIM = 32


def backend_of(name: str, spec: AttentionSpec, pool: KVPool) -> AttentionBackend:
    if name == "reference":
        return ReferenceAttention(spec, pool)
    if name == "torch":
        return TorchAttention(spec, pool)
    library = load_cpu_library(isa=name)
    if isinstance(library, str):
        pytest.skip(library)
    return CpuAttention(spec, pool, library)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["reference", "torch", *ISAS])
def test_values_are_the_first_elements_of_keys(name: str, kv_dtype: torch.dtype) -> None:
    scene = make_scene(ROWS, head_dim=48, num_kv_heads=1, group=5, page_size=16, kv_dtype=kv_dtype)
    spec = replace(scene.spec, latent_dim=LATENT_DIM)
    pool = KVPool(spec.layout(16), scene.pool.num_pages, CPU)
    pool.pages(0).keys.copy_(scene.pool.pages(0).keys)
    backend = backend_of(name, spec, pool)
    backend.plan(scene.batch)
    q, k, _ = scene.parts
    wanted = pool.pages(0).keys.clone()
    wanted.flatten(0, 1)[scene.batch.kv_slots] = k.to(kv_dtype)
    found = backend.attend(0, q, k, k[..., :LATENT_DIM])
    assert torch.equal(pool.pages(0).keys.nan_to_num(), wanted.nan_to_num())
    starts = scene.batch.query_starts.tolist()
    expected = torch.cat(
        [
            dense(q[start:end], keys, keys[..., :LATENT_DIM], spec.scale, None)
            for start, end, (keys, _) in zip(starts, starts[1:], scene.history, strict=False)
        ]
    )
    assert found.shape == (len(q), 5 * LATENT_DIM)
    error = (found.double() - expected.flatten(1)).abs().max() / expected.abs().max()
    is_rounded = isinstance(backend, CpuAttention) and backend.is_rounded
    assert error < (6e-3 if is_rounded else 1e-5)


def test_kernels_with_a_plane_of_values_refuse_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "why_missing", lambda *_: "")
    spec = replace(make_scene(((1, 1),), num_kv_heads=1).spec, latent_dim=LATENT_DIM)
    for module in (flash, triton_attention):
        assert module.offer(spec) == "values are the first elements of keys (latent attention)"
    # Heads of the published models, of which the compiled operations take whole keys as values.
    wide = replace(spec, head_dim=576, latent_dim=512)
    if not isinstance(load_cpu_library(), str):
        assert choose_backend("auto", wide).name == "cpu"
    assert choose_backend("torch", wide).name == "torch"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_codes_of_latent_vectors_are_read_as_they_are_stored(name: str) -> None:
    scene = make_scene(ROWS, head_dim=48, num_kv_heads=1, group=5, page_size=16)
    spec = replace(scene.spec, latent_dim=LATENT_DIM, kv_format=KV_FORMATS["int8"])
    pool = KVPool(spec.layout(16), scene.pool.num_pages, CPU)
    starts, ends = scene.batch.query_starts.tolist(), scene.batch.seq_lens.tolist()
    for row, (keys, _) in enumerate(scene.history):
        at = torch.arange(ends[row])
        slots = scene.batch.block_table[row, at // 16].long() * 16 + at % 16
        pool.store(0, slots, keys, keys[..., :LATENT_DIM])
    backend = backend_of(name, spec, pool)
    backend.plan(scene.batch)
    q, k, _ = scene.parts
    found = backend.attend(0, q, k, k[..., :LATENT_DIM])
    kept = pool.layout.format_of(0)
    expected = []
    for start, end, (keys, _) in zip(starts, starts[1:], scene.history, strict=False):
        read = kept.decode(*kept.encode(keys))
        expected.append(dense(q[start:end], read, read[..., :LATENT_DIM], spec.scale, None))
    wanted = torch.cat(expected).flatten(1)
    assert (found.double() - wanted).abs().max() / wanted.abs().max() < 1e-5
    assert "codes of latent vectors are read by torch alone" in str(cpu.offer(spec))
