"""The operations for 64-bit Arm CPUs by emulation, held against plain torch (ADR 23).

On such a CPU the tests of the neighbours run natively, on the same instruction sets.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulated_arm import CPUS, NEON_ISAS, EmulatedArm, build, emulated
from exact_layers import (
    CODINGS,
    EPS,
    Coding,
    error,
    exact_product,
    normed,
    random,
    rotated,
    rounded_to_bytes,
    tiles_of,
)
from torch import Tensor

from model.cpu.library import DTYPE_CODES
from model.kv.arena import Arena
from model.weights.round_integers import Rounding
from model.weights.tiles import Factors, Tiles, pack_floats, pack_integers

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("best", NEON_ISAS)
def test_a_cpu_has_the_instruction_sets_that_it_reports(arm_programs: Path, best: str) -> None:
    with emulated(build(arm_programs, NEON_ISAS), "neon", CPUS[best]) as arm:
        found = [isa for isa in (*NEON_ISAS, "scalar", "avx2") if arm.supports(isa)]
    assert found == list(NEON_ISAS[NEON_ISAS.index(best) :])


# ---- products ------------------------------------------------------------------------------------


def product(arm: EmulatedArm, tiles: Tiles, weights: Tensor, x: Tensor) -> Tensor:
    out = arm.put(torch.full((len(x), tiles.num_outputs), torch.nan))
    arm.call("octavo_product", arm.kernels, x, *x.shape, weights, tiles.num_outputs, out, 2)
    return arm.get(out, len(x), tiles.num_outputs)


def as_it_enters(arm: EmulatedArm, x: Tensor, activation_bits: int) -> Tensor:
    x = x.bfloat16().float() if arm.isa == "neon_bf16" else x
    return rounded_to_bytes(x) if activation_bits == 8 else x.double()


#: Formats of weights, and the bits of the activations that meet them.
FORMS = [(coding, 16) for coding in CODINGS] + [(coding, 8) for coding in CODINGS[1:]]


@pytest.mark.parametrize(("coding", "activation_bits"), FORMS, ids=str)
def test_a_product_is_that_of_its_own_rows(
    arm: EmulatedArm, coding: Coding, activation_bits: int
) -> None:
    tiles = tiles_of(coding, 88, 448)
    weights = arm.put_weights(tiles, activation_bits)
    x = random(29, 448, seed=4)
    if activation_bits == 8:
        # Blocks of 32 inputs have very different sizes, and some are zero.
        x *= random(29, 14, seed=5).exp().repeat_interleave(32, 1)
        x[::3, 64:128] = 0
    found = product(arm, tiles, weights, x)
    # Of 16 bits: half a step of the rows, relative to their largest number.
    tolerance = 5e-5 if activation_bits == 16 else 1e-6
    assert error(found, exact_product(tiles, as_it_enters(arm, x, activation_bits))) < tolerance
    for num_rows in (1, 2, 3, 4, 5, 6, 8, 9, 12, 13):
        assert torch.equal(product(arm, tiles, weights, x[:num_rows]), found[:num_rows])
    assert torch.equal(product(arm, tiles, weights, x[28:]), found[28:])


SOME_FORMS = [(CODINGS[0], 16), (CODINGS[1], 16), (CODINGS[1], 8)]


@pytest.mark.parametrize(("coding", "activation_bits"), SOME_FORMS, ids=str)
def test_more_rows_than_are_computed_at_once(
    arm: EmulatedArm, coding: Coding, activation_bits: int
) -> None:
    tiles = tiles_of(coding, 16, 64)
    weights, x = arm.put_weights(tiles, activation_bits), random(300, 64, seed=4)
    found = product(arm, tiles, weights, x)
    assert error(found, exact_product(tiles, as_it_enters(arm, x, activation_bits))) < 5e-5
    assert torch.equal(product(arm, tiles, weights, x[250:]), found[250:])


@pytest.mark.parametrize(("coding", "activation_bits"), SOME_FORMS, ids=str)
def test_what_is_no_number_shows_in_its_row_and_in_no_other(
    arm: EmulatedArm, coding: Coding, activation_bits: int
) -> None:
    tiles = tiles_of(coding, 20, 128)
    weights, x = arm.put_weights(tiles, activation_bits), random(5, 128, seed=1)
    x[2] = 0
    clean = product(arm, tiles, weights, x)
    assert tiles.bias is not None
    assert torch.equal(clean[2], tiles.bias[:20])
    x[1, 40], x[4, 3] = torch.nan, torch.inf
    found = product(arm, tiles, weights, x)
    assert not found[[1, 4]].isfinite().any()
    assert torch.equal(found[[0, 2, 3]], clean[[0, 2, 3]])


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_rows_are_looked_up(arm: EmulatedArm, coding: Coding) -> None:
    tiles, indices = tiles_of(coding, 40, 80), torch.tensor([39, 0, 17, 17])
    weights, out = arm.put_weights(tiles), arm.put(torch.full((4, 80), torch.nan))
    named = ("octavo_look_up", arm.kernels, weights, 40, 80)
    assert arm.call(*named, indices, 4, out)
    assert error(arm.get(out, 4, 80), tiles.rows(indices)) < 1e-6
    assert not arm.call(*named, torch.tensor([40]), 1, out)


ROUNDINGS = [None, Rounding(8, 128), Rounding(5, 32), Rounding(4, 32, is_searched=True)]


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_weights_are_packed_as_torch_packs_them(
    arm: EmulatedArm, dtype: torch.dtype, rounding: Rounding | None
) -> None:
    rows = random(37, 200, dtype=dtype)
    if rounding is None:
        packed = pack_floats(rows, None, Arena())
        assert torch.equal(pack(arm, rows, packed), packed.weight)
        return
    rounded = rounding(rows.float())
    packed, factors = pack_integers(rounded, None, Arena(), num_inputs=200), Factors.of(rounded)
    assert torch.equal(pack(arm, rounded.codes.view(torch.uint8), packed), packed.weight)
    expected = [one for one in (factors.scales, factors.minimums) if one is not None]
    found = [arm.put(torch.zeros_like(one)) for one in expected]
    assert torch.equal(pack(arm, rows, packed, *found), packed.weight)
    for address, one in zip(found, expected, strict=True):
        assert torch.equal(arm.get(address, *one.shape), one)


def pack(
    arm: EmulatedArm, rows: Tensor, expected: Tiles, scales: int = 0, minimums: int = 0
) -> Tensor:
    """Return the packed rows, in the shape of the expected ones."""
    weight = expected.weight
    out = arm.put(torch.zeros_like(weight))
    assert arm.call(
        *("octavo_pack", arm.kernels, rows, DTYPE_CODES.get(rows.dtype, 0), rows.stride(0)),
        *(*rows.shape, weight.shape[1], expected.bits, expected.code_offset),
        *(expected.group_inputs, out, scales, minimums),
    )
    return arm.get(out, *weight.shape, dtype=weight.dtype)


# ---- small operations ----------------------------------------------------------------------------

DTYPES = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
TOLERANCE = {F32: 2e-6, F16: 1e-3, BF16: 8e-3}


@DTYPES
@pytest.mark.parametrize("dim", [96, 50])
def test_norms(arm: EmulatedArm, dtype: torch.dtype, dim: int) -> None:
    x, residual, weight = (
        random(*shape, seed=i) for i, shape in enumerate([(3, dim), (3, dim), (dim,)])
    )
    x, code = x.to(dtype), DTYPE_CODES[dtype]
    sums, out = arm.put(residual), arm.put(torch.empty(3, dim, dtype=dtype))
    for residual_at, exact in ((0, x.double()), (sums, x.double() + residual.double())):
        arm.call(
            *("octavo_norm", arm.kernels, 3, dim, x, code, dim, residual_at, weight, 0, EPS),
            *(out, code),
        )
        found = arm.get(out, 3, dim, dtype=dtype)
        assert error(found, normed(exact, weight.double())) < TOLERANCE[dtype]
    assert torch.equal(arm.get(sums, 3, dim), x.float() + residual)


@DTYPES
@pytest.mark.parametrize("rotary_dim", [32, 20])
def test_rope(arm: EmulatedArm, dtype: torch.dtype, rotary_dim: int) -> None:
    tokens, heads, dim = 4, 3, 32
    x = random(tokens, heads, dim, dtype=dtype)
    positions = torch.tensor([7, 0, 3, 9])
    angles = torch.arange(10).double()[:, None] / 10 ** torch.arange(rotary_dim // 2)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    at = arm.put(x)
    strides = (heads * dim, dim)
    arm.call(
        *("octavo_rope", arm.kernels, tokens, DTYPE_CODES[dtype], at, *strides, heads, at),
        *(*strides, 0, positions, cos_sin, rotary_dim),
    )
    found = arm.get(at, tokens, heads, dim, dtype=dtype)
    turned = rotated(x.double(), angles[positions])
    assert error(found, turned) < TOLERANCE[dtype]
    assert torch.equal(found[..., rotary_dim:], x[..., rotary_dim:])


@DTYPES
def test_silu_and_mul(arm: EmulatedArm, dtype: torch.dtype) -> None:
    gate_up = 4 * random(3, 108, dtype=dtype)
    out = arm.put(torch.empty(3, 54, dtype=dtype))
    arm.call("octavo_silu_mul", arm.kernels, 3, 54, gate_up, 108, DTYPE_CODES[dtype], out)
    gate, up = gate_up.double().chunk(2, dim=-1)
    exact = gate * torch.sigmoid(gate) * up
    assert error(arm.get(out, 3, 54, dtype=dtype), exact) < TOLERANCE[dtype]


@DTYPES
def test_keys_are_stored_as_torch_rounds(arm: EmulatedArm, dtype: torch.dtype) -> None:
    """Also the smallest numbers, ties, overflow, infinity and NaN."""
    edge = torch.tensor([1e-8, 5.96e-8, 6.1e-5, 1.00048828125, 1.00146484375, 65519.0, 65520.0])
    values = torch.cat([edge, -edge, random(244), random(120) * 1e-4, torch.full((2,), torch.nan)])
    values = torch.cat([values, torch.tensor([torch.inf, -torch.inf, 3e38, 1e-40])])
    tokens, heads, dim = 4, 3, 32
    x = values[: tokens * heads * dim].view(tokens, heads, dim)
    pages = arm.put(torch.full((6, heads, dim), 7, dtype=dtype))
    slots = torch.tensor([5, 0, 3, 2])
    code = DTYPE_CODES[dtype]
    arm.call("store_tokens", arm.kernels, x, tokens, heads, dim, pages, 0, code, slots)
    expected = torch.full((6, heads, dim), 7, dtype=dtype)
    expected[slots] = x.to(dtype)
    found = arm.get(pages, 6, heads, dim, dtype=dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
