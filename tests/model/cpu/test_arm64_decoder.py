"""Attention and the decoder for 64-bit Arm CPUs by emulation, held against plain torch (ADR 23).

On such a CPU the tests of the neighbours run natively, on the same instruction sets.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from emulated_arm import EmulatedArm
from exact_layers import (
    CODINGS,
    EPS,
    Coding,
    error,
    exact_product,
    normed,
    random,
    rotated,
    tiles_of,
)
from torch import Tensor

from attention_scenes import Scene, dense, make_scene, planes_of, poison
from model.attention.cpu import page_code
from model.attention.interface import AttentionBatch
from model.attention.reference import ReferenceAttention
from model.cpu.library import DTYPE_CODES
from model.kv.desks import desk_tokens
from model.kv.format import CODED_FORMATS, PAGE_FORMATS, KVFormat
from model.kv.pool import KVPool
from model.weights.tiles import Tiles

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NO_WINDOW = 2**31 - 1
DTYPES = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)


# ---- attention -----------------------------------------------------------------------------------


class Pages(NamedTuple):
    """A session in the driver, and its pages."""

    session: int
    #: For each layer: keys, values, and the scales of both where there are codes.
    planes: list[list[int]]


def open_session(arm: EmulatedArm, scene: Scene) -> Pages:
    spec, layout = scene.spec, scene.pool.layout
    layers = [planes_of(scene.pool.pages(layer)) for layer in range(spec.num_layers)]
    planes = [list(map(arm.put, one)) for one in layers]
    session = arm.call(
        *("octavo_attention_new", arm.kernels),
        torch.tensor([(*one, 0, 0)[:4] for one in planes]),
        torch.tensor([page_code(spec.kv_format)] * spec.num_layers, dtype=torch.int32),
        torch.tensor([window or NO_WINDOW for window in spec.windows], dtype=torch.int32),
        *(spec.num_layers, scene.pool.num_pages, layout.page_size, spec.num_kv_heads),
        *(spec.num_heads // spec.num_kv_heads, spec.head_dim, spec.scale),
        desk_tokens(layout.page_size, spec.max_draft_tokens),
    )
    return Pages(session, planes)


def plan(arm: EmulatedArm, session: int, scene: Scene, starts: list[int], ends: list[int]) -> None:
    """Plan rows of which row i computes the tokens from starts[i] to ends[i] of its text."""
    table, page_size = scene.batch.block_table, scene.pool.layout.page_size
    slots = [
        table[row, (at := torch.arange(start, end)) // page_size].long() * page_size
        + at % page_size
        for row, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    counts = torch.tensor([0, *(len(one) for one in slots)])
    fault = arm.call(
        *("octavo_attention_plan", session, counts.cumsum(0).int()),
        *(torch.tensor(ends, dtype=torch.int32), table, table.stride(0), torch.cat(slots)),
        *(len(starts), int(counts.sum()), 2, 0, 0, torch.arange(len(starts)).int()),
    )
    assert not fault


def attend(arm: EmulatedArm, scene: Scene, session: int, layer: int, qkv: Tensor) -> Tensor:
    """Attend `[tokens, heads and KV heads, head_dim]` of a planned step."""
    spec, dtype = scene.spec, qkv.dtype
    tokens, num_heads, dim = qkv.shape
    at, out = arm.put(qkv), arm.put(torch.full((tokens, spec.num_heads * dim), torch.nan).to(dtype))
    row_bytes = dim * dtype.itemsize
    firsts = (0, spec.num_heads, spec.num_heads + spec.num_kv_heads)
    parts = [(at + first * row_bytes, num_heads * dim, dim) for first in firsts]
    arguments = [number for part in parts for number in part]
    arm.call(
        "octavo_attention_attend", session, layer, DTYPE_CODES[dtype], *arguments, out, 0, 0, 0
    )
    return arm.get(out, tokens, spec.num_heads * dim, dtype=dtype)


MIXED = ((1, 1), (1, 300), (40, 40), (37, 290), (2, 130), (1, 256), (1, 257))
ATTENTION_TOLERANCE = {F32: 1e-5, F16: 2e-3, BF16: 1.6e-2}
SHAPES: dict[str, dict[str, Any]] = {
    "group": {"head_dim": 64, "num_kv_heads": 2, "group": 3, "page_size": 16},
    "one head": {"head_dim": 32, "num_kv_heads": 1, "group": 1, "page_size": 1},
    "many lanes": {"head_dim": 80, "num_kv_heads": 1, "group": 9, "page_size": 64},
}


@pytest.mark.parametrize("shape", SHAPES)
@DTYPES
def test_attention(arm: EmulatedArm, dtype: torch.dtype, shape: str) -> None:
    """Decodes, prompts and chunks of them; the memory of other keys is NaN."""
    windows = (None, 1, 100) if shape == "group" else (None,)
    scene = make_scene(MIXED, kv_dtype=dtype, windows=windows, **SHAPES[shape])
    pages = open_session(arm, scene)
    ends = [end for _, end in MIXED]
    plan(arm, pages.session, scene, [end - count for count, end in MIXED], ends)
    is_rounded = dtype == BF16 and arm.isa == "neon_bf16"
    for layer in range(scene.spec.num_layers):
        found = attend(arm, scene, pages.session, layer, scene.qkv)
        assert error(found, scene.expected(layer)) < (6e-3 if is_rounded else 1e-5)
        for address, plane, new in zip(
            pages.planes[layer], scene.pool.pages(layer)[:2], scene.parts[1:], strict=True
        ):
            plane.flatten(0, 1)[scene.batch.kv_slots] = new.to(dtype)
            kept = arm.get(address, *plane.shape, dtype=dtype)
            torch.testing.assert_close(kept, plane, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_attention_to_queries_of_half_precision(arm: EmulatedArm, dtype: torch.dtype) -> None:
    rows = ((1, 70), (9, 20))
    scene = make_scene(rows, head_dim=32, dtype=dtype, kv_dtype=dtype)
    session = open_session(arm, scene).session
    plan(arm, session, scene, [69, 11], [70, 20])
    found = attend(arm, scene, session, 0, scene.qkv)
    assert error(found, scene.expected(0)) < ATTENTION_TOLERANCE[dtype]


@pytest.mark.parametrize("kv_format", CODED_FORMATS, ids=lambda one: one.name)
def test_attention_to_codes(arm: EmulatedArm, kv_format: KVFormat) -> None:
    """A decode and a chunk of a prompt; the scales of other keys are NaN."""
    scene = make_scene(((1, 70), (9, 20)), head_dim=48, num_kv_heads=2, kv_format=kv_format)
    pages = open_session(arm, scene)
    plan(arm, pages.session, scene, [69, 11], [70, 20])
    found = attend(arm, scene, pages.session, 0, scene.qkv)
    assert error(found, scene.expected(0)) < 1e-5
    scene.pool.store(0, scene.batch.kv_slots, *scene.parts[1:])
    for address, plane in zip(pages.planes[0], planes_of(scene.pool.pages(0)), strict=True):
        content = plane.view(torch.uint8)
        assert torch.equal(arm.get(address, *content.shape, dtype=torch.uint8), content)


@pytest.mark.parametrize("kv_format", PAGE_FORMATS, ids=lambda one: one.name)
def test_attention_to_whole_pages(arm: EmulatedArm, kv_format: KVFormat) -> None:
    """A prompt in two chunks and a decode, as by the oracle, and the same bytes."""
    length = 75
    scene = make_scene(((length, length),), head_dim=48, num_kv_heads=2)
    spec = replace(scene.spec, kv_format=kv_format)
    pool = KVPool(spec.layout(16), scene.pool.num_pages, spec.device)
    scene = replace(scene, spec=spec, pool=pool)
    poison(pool.pages(0))
    pages, oracle = open_session(arm, scene), ReferenceAttention(scene.spec, scene.pool)
    for start, end in pairwise((0, 20, length - 1, length)):
        plan(arm, pages.session, scene, [start], [end])
        found = attend(arm, scene, pages.session, 0, scene.qkv[start:end])
        positions = torch.arange(start, end)
        starts, ends = torch.tensor([0, end - start]), torch.tensor([end])
        table, longest = scene.batch.block_table, end - start
        oracle.plan(
            AttentionBatch(starts, ends, table, positions, positions, longest, end, slots=(0,))
        )
        expected = oracle.attend(0, *(part[start:end] for part in scene.parts))
        assert error(found, expected) < (6e-3 if arm.isa == "neon_bf16" else 1e-5)
    whole = scene.batch.block_table[0, : length // 16].long()
    for address, plane in zip(pages.planes[0], planes_of(scene.pool.pages(0)), strict=True):
        content = plane.view(torch.uint8)
        kept = arm.get(address, *content.shape, dtype=torch.uint8)
        assert torch.equal(kept[whole], content[whole])


@pytest.mark.parametrize(("dtype", "window"), [(F32, None), (F16, 70), (BF16, None)], ids=str)
def test_no_cut_changes_a_bit_of_attention(
    arm: EmulatedArm, dtype: torch.dtype, window: int | None
) -> None:
    length = 290
    scene = make_scene(
        *(((length, length),),),
        head_dim=48,
        num_kv_heads=1,
        group=5,
        kv_dtype=dtype,
        windows=(window,),
    )
    qkv, found = 3 * scene.qkv, []
    cuts = ((), (1, 5, 6, 70, 254, 255, 256, 257, 258, 262, 289), (256,))
    for cut in cuts:
        session = open_session(arm, scene).session
        pieces = []
        for start, end in pairwise((0, *cut, length)):
            plan(arm, session, scene, [start], [end])
            pieces.append(attend(arm, scene, session, 0, qkv[start:end]))
        found.append(torch.cat(pieces))
    assert found[0].isfinite().all()
    assert all(torch.equal(one, found[0]) for one in found)


# ---- the whole decoder ---------------------------------------------------------------------------

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LENGTH = 80, 112, 6, 2, 16, 37
ROTARY_DIM, NUM_LAYERS = 12, 2


class Layer(NamedTuple):
    """In the order of csrc/decoder.cpp."""

    input_norm: Tensor
    qkv: Tiles
    q_norm: Tensor
    k_norm: Tensor
    o: Tiles
    post_norm: Tensor
    gate_up: Tiles
    down: Tiles


def make_layer(coding: Coding, seed: int) -> Layer:
    def tiles(at: int, outputs: int, inputs: int) -> Tiles:
        return tiles_of(coding, outputs, inputs, 10 * seed + at, 0.2)

    def norm(at: int, dim: int) -> Tensor:
        return 1 + 0.2 * random(dim, seed=10 * seed + at)

    return Layer(
        norm(0, HIDDEN),
        tiles(1, (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
        norm(2, HEAD_DIM),
        norm(3, HEAD_DIM),
        tiles(4, HIDDEN, HEADS * HEAD_DIM),
        norm(5, HIDDEN),
        tiles(6, 2 * INNER, HIDDEN),
        tiles(7, HIDDEN, INNER),
    )


def angles_of(positions: Tensor) -> Tensor:
    return positions.double()[:, None] / 10 ** torch.arange(ROTARY_DIM // 2)


def exact_layer(layer: Layer, x: Tensor) -> Tensor:
    """Compute one layer over a whole text in float64."""
    qkv = exact_product(layer.qkv, normed(x, layer.input_norm.double()))
    heads = qkv.view(len(x), -1, HEAD_DIM)
    q, k, v = torch.split(heads, [HEADS, KV_HEADS, KV_HEADS], dim=1)
    turns = angles_of(torch.arange(len(x)))
    q = rotated(normed(q, layer.q_norm.double()), turns)
    k = rotated(normed(k, layer.k_norm.double()), turns)
    x = x + exact_product(layer.o, dense(q, k, v, HEAD_DIM**-0.5, None).flatten(1))
    gate, up = exact_product(layer.gate_up, normed(x, layer.post_norm.double())).chunk(2, dim=1)
    return x + exact_product(layer.down, gate * torch.sigmoid(gate) * up)


def new_decoder(arm: EmulatedArm, layers: list[Layer], activation_bits: int) -> int:
    turns = angles_of(torch.arange(LENGTH))
    numbers: list[Tensor] = []
    for part in (part for layer in layers for part in layer):
        if isinstance(part, Tensor):
            numbers.append(torch.tensor([arm.put(part)]))
        else:
            numbers.append(arm.put_weights(part, activation_bits))
    shape = torch.tensor([HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM])
    return arm.call(
        *("octavo_decoder_new", arm.kernels, shape, EPS, torch.cat(numbers), NUM_LAYERS),
        torch.cat([turns.cos(), turns.sin()], dim=1).float(),
    )


@pytest.mark.parametrize(
    ("coding", "activation_bits"),
    [*((CODINGS[i], 16) for i in (0, 1, 5, 6)), (CODINGS[6], 8)],
    ids=str,
)
def test_the_decoder_is_exact_and_no_cut_changes_a_bit(
    arm: EmulatedArm, coding: Coding, activation_bits: int
) -> None:
    """Gated products, those added to the residual, biases, and norms of heads."""
    layers = [make_layer(coding, seed) for seed in range(NUM_LAYERS)]
    decoder, x = new_decoder(arm, layers, activation_bits), random(LENGTH, HIDDEN, seed=99)
    scene = make_scene(
        ((LENGTH, LENGTH),),
        head_dim=HEAD_DIM,
        num_kv_heads=KV_HEADS,
        group=HEADS // KV_HEADS,
        windows=(None,) * NUM_LAYERS,
    )
    found = []
    for cut in ((), tuple(range(1, LENGTH)), (7, 8, 30)):
        session, pieces = open_session(arm, scene).session, []
        for start, end in pairwise((0, *cut, LENGTH)):
            plan(arm, session, scene, [start], [end])
            residual = arm.put(x[start:end])
            positions = torch.arange(start, end)
            arm.call("octavo_decoder_forward", decoder, session, positions, residual, 0, 0, 0, 0, 0)
            pieces.append(arm.get(residual, end - start, HIDDEN))
        found.append(torch.cat(pieces))
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])
    exact = x.double()
    for layer in layers:
        exact = exact_layer(layer, exact)
    num_roundings = (arm.isa == "neon_bf16") + (activation_bits == 8)
    assert error(found[0], exact) < 2e-4 + 3e-2 * num_roundings
