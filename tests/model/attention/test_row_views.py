"""Rows with views of their own: the read rule, both rotations, and keys that are not read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attention_scenes import CPU, Scene, make_scene, poison, with_views
from cache.view import FULL_VIEW, View
from model.architectures.arch import RopeSpec
from model.architectures.rope import (
    cos_sin_rows,
    cos_sin_table,
    inverse_frequencies,
    late_frequencies,
)
from model.attention.cpu import CpuAttention
from model.attention.interface import AttentionBackend, AttentionBatch, AttentionSpec
from model.attention.reference import ReferenceAttention
from model.attention.torch_sdpa import TorchAttention
from model.attention.triton_attention import TritonAttention
from model.cpu.instruction_sets import ISAS
from model.cpu.library import load_cpu_library
from model.kv.format import KV_FORMATS
from model.kv.pool import KVPool
from model.ops import TorchOps

F32, BF16 = torch.float32, torch.bfloat16
Build = Callable[[AttentionSpec, KVPool], AttentionBackend]

TRITON_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Tokens of the step and tokens in all, and the view.
ROWS = (
    (1, 700, View(4, 60)),
    (40, 40, View(4, 60)),
    (37, 300, FULL_VIEW),
    (64, 600, View(300, 100)),
    (90, 130, View(4, 60)),
    (1, 130, View(0, 64)),
    (30, 400, View(0, 300)),
    (1, 290, View(280, 9)),
    (1, 17, FULL_VIEW),
    (2, 65, View(4, 60)),
)
WINDOWS = (None, 50, 63, 200, 330)
#: For interpreted kernels. Both kernels meet the first position in view among their queries, and
#: a tile of 64 keys with the last sinks in it.
FEW_ROWS = (
    (1, 200, View(4, 60)),
    (20, 75, View(4, 60)),
    (3, 66, View(4, 60)),
    (5, 140, View(70, 9)),
    (9, 110, View(70, 30)),
    (12, 40, FULL_VIEW),
    (2, 130, View(0, 64)),
    (1, 64, View(4, 60)),
)
FEW_WINDOWS = (None, 50)


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
    "triton": TritonAttention,
    **{f"cpu-{isa}": cpu(isa) for isa in ISAS},
}


def hidden(view: View, layer_window: int | None, queries: Tensor, num_keys: int) -> Tensor:
    """Return `[queries, keys]`: a layer's window counts from the position towards the key."""
    key, window = torch.arange(num_keys), layer_window or 2**31
    query = queries[:, None]
    bound = view.max_keys or 2**31
    is_sink = (key < view.sinks) & (query >= bound)
    near = min(window, view.window or window)
    back = torch.where(is_sink, bound - 1 - key, query - key)
    limit = torch.where(is_sink | (query < bound), window, near)
    return (key > query) | (back >= limit)


def expected(scene: Scene, sink_q: Tensor, views: tuple[View, ...], layer: int) -> Tensor:
    """Attend in float64, with the read rule as a mask."""
    spec, q, sink_q = scene.spec, scene.parts[0].double().cpu(), sink_q.cpu()
    group, results = spec.num_heads // spec.num_kv_heads, []
    starts = scene.batch.query_starts.tolist()
    for row, (view, history) in enumerate(zip(views, scene.history, strict=True)):
        keys, values = (x.double().repeat_interleave(group, dim=1) for x in history)
        mine = slice(starts[row], starts[row + 1])
        queries = torch.arange(len(keys) - (mine.stop - mine.start), len(keys))
        own, moved = (torch.einsum("qhd,khd->hqk", x[mine].double(), keys) for x in (q, sink_q))
        is_sink = torch.arange(len(keys)) < view.sinks
        is_moved = is_sink & (queries[:, None] >= (view.max_keys or 2**31))
        scores = torch.where(is_moved, moved, own) * spec.scale
        scores.masked_fill_(hidden(view, spec.windows[layer], queries, len(keys)), -torch.inf)
        results.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(results).flatten(1)


def poison_unread(scene: Scene, views: tuple[View, ...]) -> None:
    """Fill with NaN each key that no query of the step reads in any layer, and its page's entry."""
    batch, page_size = scene.batch, scene.pool.layout.page_size
    stranger = int(batch.block_table[0, -1])
    counts = batch.query_starts.diff().tolist()
    for row, (view, end) in enumerate(zip(views, batch.seq_lens.tolist(), strict=True)):
        if view == FULL_VIEW:
            continue
        queries = torch.arange(end - counts[row], end)
        at = hidden(view, None, queries, end).all(0).nonzero()[:, 0]
        slots = batch.block_table[row, at // page_size].long() * page_size + at % page_size
        for layer in range(scene.spec.num_layers):
            poison(scene.pool.pages(layer), slots)
        for page in view.unread_pages(end - counts[row], page_size):
            batch.block_table[row, page] = stranger


def scene_of(
    name: str, kv_format: str = "float32", page_size: int = 16, *, is_poisoned: bool = True
) -> tuple[Scene, Tensor, tuple[View, ...]]:
    """Return a scene for a backend, and views.

    Its queries towards sinks are such that no rotation would give: all must be used.
    """
    is_slow = name == "triton"
    rows = FEW_ROWS if is_slow else ROWS
    scene = make_scene(
        tuple((count, end) for count, end, _ in rows),
        head_dim=32,
        num_kv_heads=1 if is_slow else 2,
        group=3,
        kv_format=KV_FORMATS[kv_format],
        page_size=page_size,
        windows=FEW_WINDOWS if is_slow else WINDOWS,
    )
    views = tuple(view for _, _, view in rows)
    scene = scene.on(TRITON_DEVICE) if is_slow else scene
    scene = replace(scene, batch=with_views(scene.batch, views))
    generator = torch.Generator().manual_seed(7)
    sink_q = torch.randn(scene.parts[0].shape, generator=generator)
    if is_poisoned:
        poison_unread(scene, views)
    return scene, sink_q.to(scene.spec.device), views


#: Of pages; codes for interpreted kernels alone, whose scene is small.
FORMATS = (("float32", 16), ("bfloat16", 3))
CODED_FORMATS = (("int8", 64), ("fp8", 16), ("int4", 5))


@pytest.mark.parametrize(
    ("name", "kv_format", "page_size"),
    [
        *((name, *one) for name in BACKENDS for one in FORMATS),
        *(("triton", *one) for one in CODED_FORMATS),
    ],
)
def test_each_row_reads_what_its_view_shows(name: str, kv_format: str, page_size: int) -> None:
    scene, sink_q, views = scene_of(name, kv_format, page_size)
    backend = BACKENDS[name](scene.spec, scene.pool)
    backend.plan(scene.batch)
    for layer in range(scene.spec.num_layers):
        found = backend.attend(layer, *scene.parts, sink_q)
        wanted = expected(scene, sink_q, views, layer)
        assert found.isfinite().all(), "read a key that no view shows"
        is_rounded = isinstance(backend, CpuAttention) and backend.is_rounded
        error = (found.cpu().double() - wanted).abs().max() / wanted.abs().max()
        assert error < (6e-3 if is_rounded else 1e-5), f"off by {error:.2g}"


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_without_a_view_change_by_no_bit(name: str) -> None:
    # The interpreter fails where it computes with NaN, which rows without their views read.
    scene, sink_q, views = scene_of(name, is_poisoned=name != "triton")
    backend = BACKENDS[name](scene.spec, scene.pool)
    results = []
    for batch, queries in ((scene.batch, sink_q), (replace(scene.batch, views=None), None)):
        backend.plan(batch)
        layers = range(scene.spec.num_layers)
        results.append([backend.attend(layer, *scene.parts, queries) for layer in layers])
    starts, ends = scene.batch.query_starts.tolist(), scene.batch.seq_lens.tolist()
    plain = [row for row, view in enumerate(views) if (view.max_keys or ends[row]) >= ends[row]]
    assert plain
    for with_view, without in zip(*results, strict=True):
        for row in plain:
            mine = slice(starts[row], starts[row + 1])
            if name == "torch" and mine.stop == mine.start + 1:
                # Decodes are computed together there, as many as there are.
                torch.testing.assert_close(with_view[mine], without[mine])
            else:
                assert torch.equal(with_view[mine], without[mine])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("view", [View(4, 60), View(300, 40), View(0, 70)], ids=str)
@pytest.mark.parametrize("kv_dtype", [F32, BF16], ids=str)
def test_no_cut_of_a_text_changes_a_bit(isa: str, view: View, kv_dtype: torch.dtype) -> None:
    """In one piece, token by token, and in pieces around the first token with hidden keys."""
    length, bounds = 420, view.max_keys or 0
    scene = make_scene(((length, length),), head_dim=32, num_kv_heads=2, group=3, kv_dtype=kv_dtype)
    sink_q = torch.randn(scene.parts[0].shape, generator=torch.Generator().manual_seed(3))
    backend = cpu(isa)(scene.spec, scene.pool)
    found = []
    cuts: tuple[tuple[int, ...], ...] = ((), (bounds - 1, bounds, bounds + 1), (7, 260, 261, 400))
    for cut in (*cuts, tuple(range(1, length))):
        pieces = []
        for start, end in zip((0, *cut), (*cut, length), strict=True):
            batch = AttentionBatch(
                query_starts=torch.tensor([0, end - start]).int(),
                seq_lens=torch.tensor([end]).int(),
                block_table=scene.batch.block_table,
                positions=torch.arange(start, end),
                kv_slots=scene.batch.kv_slots[start:end],
                max_query_len=end - start,
                max_seq_len=end,
            )
            backend.plan(with_views(batch, (view,)))
            q, k, v, moved = (part[start:end] for part in (*scene.parts, sink_q))
            pieces.append(backend.attend(0, q, k, v, moved))
        found.append(torch.cat(pieces))
    for pieces_of_text in found[1:]:
        assert torch.equal(pieces_of_text, found[0])


# ---- StreamingLLM --------------------------------------------------------------------------------

_ROPE = RopeSpec(theta=10_000.0, rotary_dim=32)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    x = x.clone()
    TorchOps().apply_rope(x, x[:, :0], positions, cos_sin_table(_ROPE, 512))
    return x


def test_two_rotations_of_a_query_are_renumbered_keys() -> None:
    """StreamingLLM rotates cached keys by their index in the cache, we rotate the query twice."""
    length, view = 200, View(4, 40)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(length, 2, 32, generator=generator) for _ in range(3))
    spec = AttentionSpec(
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=32,
        scale=32**-0.5,
        windows=(None,),
        dtype=F32,
        kv_format=KV_FORMATS["float32"],
        device=CPU,
    )
    renumbered = []
    for query in range(length):
        kept = [s for s in range(query + 1) if s < view.sinks or query - s < 40]
        keys = rotated(k[kept], torch.arange(len(kept)))
        [asked] = rotated(q[query : query + 1], torch.tensor([len(kept) - 1]))
        weights = ((asked * keys).sum(-1) * spec.scale).softmax(0)
        renumbered.append((weights[..., None] * v[kept]).sum(0).flatten())
    at = torch.arange(length)
    pool = KVPool(spec.layout(16), 20, CPU)
    batch = with_views(
        AttentionBatch(
            query_starts=torch.tensor([0, length]).int(),
            seq_lens=torch.tensor([length]).int(),
            block_table=torch.arange(20).int()[None],
            positions=at,
            kv_slots=at,
            max_query_len=length,
            max_seq_len=length,
        ),
        (view,),
    )
    assert batch.views is not None
    backend = ReferenceAttention(spec, pool)
    backend.plan(batch)
    sink_q = rotated(q, batch.views.sink_positions.clamp(min=0))
    found = backend.attend(0, rotated(q, at), rotated(k, at), v, sink_q)
    torch.testing.assert_close(found, torch.stack(renumbered), rtol=0, atol=1e-5)


def test_angles_go_on_behind_the_table() -> None:
    table = cos_sin_table(_ROPE, 64)
    positions = torch.tensor([3, 63, 64, 1000, 2**20])
    rows = cos_sin_rows(_ROPE, table, positions, late_frequencies(_ROPE, 64))
    assert torch.equal(rows[:2], table[[3, 63]])
    angles = positions[2:, None].double() * inverse_frequencies(_ROPE).double()
    torch.testing.assert_close(rows[2:, :16].double(), angles.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(rows[2:, 16:].double(), angles.sin(), rtol=0, atol=1e-6)
