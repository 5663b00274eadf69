from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from model.weights.interface import QuantizedRows
from model.weights.quantized_rows import dequantize, group_inputs
from model.weights.round_integers import by_magnitude, by_search, rounding_of


def _weight(num_outputs: int = 64, num_inputs: int = 512) -> Tensor:
    return torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(0)) / 30


def _error(rows: QuantizedRows, weight: Tensor) -> float:
    """Return the squared error, relative."""
    kept = dequantize(rows)[:, : weight.shape[1]]
    return float((kept - weight).square().sum() / weight.square().sum())


def _by_range(weight: Tensor, group: int) -> float:
    """Return the error of four bits over the range of each group: no search."""
    groups = weight.view(-1, group)
    low, high = groups.aminmax(dim=1, keepdim=True)
    scale = (high - low) / 15
    kept = ((groups - low) / scale).round() * scale + low
    return float((kept - groups).square().sum() / weight.square().sum())


@pytest.mark.parametrize(("group", "share"), [(32, 0.87), (64, 0.9)])
def test_a_search_finds_less_error_than_the_range_gives(group: int, share: float) -> None:
    weight = _weight()
    assert _error(by_search(weight, group), weight) < share * _by_range(weight, group)


def test_values_on_sixteen_levels_are_kept() -> None:
    codes = torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(1))
    # Every level occurs, so the range is that of the codes.
    codes[:, ::32], codes[:, 1::32] = 0, 15
    weight = codes * 0.125 - 0.5
    assert torch.equal(dequantize(by_search(weight, 32)), weight)


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0, 1e-20, 1e6])
def test_a_group_of_equal_values_is_kept(value: float) -> None:
    kept = dequantize(by_search(torch.full((2, 64), value), 32))
    torch.testing.assert_close(kept, torch.full((2, 64), value), rtol=2.0**-10, atol=1e-30)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_inputs", [70, 576])
def test_rows_are_padded_to_whole_groups(bits: int, num_inputs: int) -> None:
    weight = _weight(5, num_inputs)
    rows = by_magnitude(weight, 8, 128) if bits == 8 else by_search(weight, 128)
    width = -(-num_inputs // 128) * 128
    assert rows.codes.shape == (5, width)
    assert rows.scales.shape == (5, width // 128)
    assert (rows.bits, rows.minimums is None) == (bits, bits == 8)
    assert _error(rows, weight) < (1e-4 if bits == 8 else 2e-2)


@pytest.mark.parametrize("rounder", [by_search, partial(by_magnitude, bits=8)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_so_in_their_output(rounder: object, bad: float) -> None:
    weight = _weight(4, 64)
    weight[2, 40] = bad
    kept = dequantize(rounder(weight, group_inputs=32))  # type: ignore[operator] # a function
    assert not kept[2].isfinite().all()
    assert kept[[0, 1, 3]].isfinite().all()


def test_scales_are_halves() -> None:
    rows = by_search(_weight(), 32)
    assert rows.minimums is not None
    for part in (rows.scales, rows.minimums):
        assert torch.equal(part, part.half().float())


@pytest.mark.parametrize(
    ("part", "int8", "int4"),
    [
        ("gate_up", (8, 128), (4, 32)),
        ("o", (8, 128), (4, 32)),
        ("qkv", (8, 128), (6, 32)),
        ("down", (8, 128), (6, 32)),
        ("lm_head", (8, 64), (8, 64)),
        ("embedding", (8, 64), (8, 64)),
    ],
)
def test_each_product_has_the_bits_that_it_needs(
    part: str, int8: tuple[int, int], int4: tuple[int, int]
) -> None:
    for rounding, expected in (
        (rounding_of("int8", part), int8),
        (rounding_of("int4", part), int4),
    ):
        rows = rounding(_weight())
        assert (rows.bits, group_inputs(rows)) == expected
        assert (rows.minimums is not None) == (rows.bits == 4)
