"""Packed weights without kernels: the layout, and that nothing but factors is rounded."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from model.kv.arena import Arena
from model.weights.interface import QuantizedRows
from model.weights.quantized_rows import dequantize
from model.weights.tile_layout import arrange, num_lines, restore
from model.weights.tiles import pack_floats, pack_integers

BITS = (4, 5, 6, 8)


def _codes(bits: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)


def _rows(bits: int, inputs: int, *, is_signed: bool, has_minimums: bool) -> QuantizedRows:
    codes = _codes(bits, 37, 352)
    generator = torch.Generator().manual_seed(1)
    scales = torch.rand(37, 352 // inputs, generator=generator).half().float()
    minimums = torch.randn(37, 352 // inputs, generator=generator).half().float()
    if is_signed:
        codes = (codes - 2 ** (bits - 1)).view(torch.int8)
    return QuantizedRows(codes, scales, minimums if has_minimums else None, bits)


def _digit(tile: Tensor, bits: int, four: int, lane: int, j: int) -> int:
    """Read a code from its tile `[lines, 16, 4]`, as csrc/products.h describes it."""
    if bits == 8:
        return int(tile[four, lane, j])
    low = int(tile[four // 2, lane, j]) >> 4 * (four % 2) & 15
    if bits == 6:
        return low | (int(tile[8 + four // 4, lane, j]) >> 2 * (four % 4) & 3) << 4
    if bits == 5:
        return low | (int(tile[8 + four // 8, lane, j]) >> four % 8 & 1) << 4
    return low


@pytest.mark.parametrize("bits", BITS)
def test_every_code_is_at_its_place(bits: int) -> None:
    codes = _codes(bits, 32, 128)
    tiles = arrange(codes, bits)
    assert tiles.dtype == torch.uint8
    assert tiles.shape == (2, 2, num_lines(bits), 16, 4)
    assert tiles[0, 0].numel() == {4: 512, 5: 640, 6: 768, 8: 1024}[bits]
    for output, at in itertools.product(range(32), range(128)):
        tile = tiles[output // 16, at // 64]
        found = _digit(tile, bits, at % 64 // 4, output % 16, at % 4)
        assert found == codes[output, at], (output, at)
    outputs = torch.arange(32)
    assert torch.equal(restore(tiles[outputs // 16, :, :, outputs % 16], bits), codes)


@pytest.mark.parametrize("has_minimums", [False, True])
@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize("inputs", [16, 32])
@pytest.mark.parametrize("bits", BITS)
def test_integers_return_from_their_tiles(
    bits: int, inputs: int, is_signed: bool, has_minimums: bool
) -> None:
    rows = _rows(bits, inputs, is_signed=is_signed, has_minimums=has_minimums)
    tiles = pack_integers(rows, None, Arena())
    indices = torch.tensor([36, 0, 17, 17, 5])
    expected = dequantize(rows)[indices]
    found = tiles.rows(indices)
    is_moved = has_minimums and is_signed == (bits < 8)
    if not is_moved:
        assert torch.equal(found, expected)
    # Minimums of codes that moved are rounded to halves.
    assert ((found - expected).abs() <= 2.0**-10 * expected.abs().max()).all()
    assert tiles.scales is not None
    assert tiles.scales.dtype == torch.float16
    assert tiles.group_inputs == inputs
    assert tiles.code_offset == (
        2 ** (bits - 1) if is_signed and bits < 8 and not has_minimums else 0
    )


@pytest.mark.parametrize("bits", BITS)
def test_padding_is_zero(bits: int) -> None:
    rows = _rows(bits, 32, is_signed=True, has_minimums=False)
    tiles = pack_integers(rows, torch.ones(37), Arena())
    assert tiles.weight.shape[:2] == (3, 6)
    padded = pack_integers(rows, None, Arena()).rows(torch.arange(37, 48))
    assert not padded.any()
    outputs = torch.arange(48)
    codes = restore(tiles.weight[outputs // 16, :, :, outputs % 16], bits)
    assert (codes[37:] == tiles.code_offset).all()
    assert (codes[:, 352:] == tiles.code_offset).all()
    assert tiles.scales is not None
    assert not tiles.scales[:, 11:].any()
    assert not tiles.scales[2, :, 5:].any()
    assert tiles.bias is not None
    assert tiles.bias.tolist() == [1] * 37 + [0] * 11


def test_more_than_one_slab_is_packed() -> None:
    codes = _codes(4, 5000, 256)
    rows = QuantizedRows(codes, torch.ones(5000, 8), None, 4)
    found = pack_integers(rows, None, Arena()).rows(torch.arange(5000))
    assert torch.equal(found, codes.float())


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (0.5, torch.float16),
        # An output whose scales are all below the normal halves, or above all halves.
        (1e-6, torch.float32),
        (1e5, torch.float32),
        (float("nan"), torch.float32),
        (float("inf"), torch.float32),
    ],
)
def test_factors_are_halves_where_these_hold_them(scale: float, dtype: torch.dtype) -> None:
    scales = torch.full((16, 2), 0.25)
    # A small scale beside a large one of its output adds nothing that counts.
    scales[3, 1] = 1e-7
    scales[4] = scale
    tiles = pack_integers(QuantizedRows(_codes(4, 16, 64), scales, None, 4), None, Arena())
    assert tiles.scales is not None
    assert tiles.scales.dtype == dtype
    assert torch.equal(tiles.scales[0, 0, 4].isfinite(), torch.tensor(scale).isfinite())


def test_all_parts_are_counted_and_described() -> None:
    rows = _rows(6, 16, is_signed=False, has_minimums=True)
    tiles = pack_integers(rows, torch.zeros(37), Arena())
    assert tiles.num_bytes == 3 * 6 * 768 + 2 * (3 * 24 * 16 * 2) + 48 * 4
    assert tiles.description[4:] == (6, 16, 0, 1)
    assert all(tiles.description[:4])
    wide = pack_floats(torch.ones(16, 64), None, Arena())
    assert wide.description[1:] == (0, 0, 0, 16, 0, 0, 0)
