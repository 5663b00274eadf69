from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from model.architectures.arch import RopeSpec
from model.architectures.rope import attention_factor, cos_sin_table, inverse_frequencies

PLAIN = RopeSpec(theta=100.0, rotary_dim=4)
YARN = RopeSpec(
    theta=10000.0, rotary_dim=64, variant="yarn", factor=8.0, original_max_positions=2048
)


def test_the_table_holds_cosines_then_sines_of_each_position() -> None:
    # Two pairs: one radian a position, and a tenth of one.
    table = cos_sin_table(PLAIN, 8)
    assert table.shape == (8, 4)
    assert table.dtype == torch.float32
    expected = [math.cos(3), math.cos(0.3), math.sin(3), math.sin(0.3)]
    assert table[3].tolist() == pytest.approx(expected, abs=1e-6)


def test_linear_is_the_same_angle_later() -> None:
    stretched = cos_sin_table(replace(PLAIN, variant="linear", factor=4.0), 32)
    torch.testing.assert_close(stretched[::4], cos_sin_table(PLAIN, 8))


def test_llama3_keeps_short_waves_and_stretches_long_ones() -> None:
    plain = RopeSpec(theta=500000.0, rotary_dim=128)
    before = inverse_frequencies(plain)
    after = inverse_frequencies(
        replace(plain, variant="llama3", factor=8.0, original_max_positions=8192)
    )
    wavelengths = 2 * math.pi / before
    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    torch.testing.assert_close(after[short], before[short])
    torch.testing.assert_close(after[long], before[long] / 8)
    between = ~(short | long)
    assert between.any()
    assert ((after[between] < before[between]) & (after[between] > before[between] / 8)).all()


def test_yarn_goes_from_kept_to_stretched() -> None:
    before = inverse_frequencies(replace(YARN, variant="default"))
    share = inverse_frequencies(YARN) / before
    assert share[0] == pytest.approx(1.0)
    assert share[-1] == pytest.approx(1 / 8)
    assert (share.diff() <= 1e-6).all()


def test_yarn_scales_cosines_and_sines() -> None:
    factor = 0.1 * math.log(8) + 1
    assert attention_factor(YARN) == pytest.approx(factor)
    half = YARN.rotary_dim // 2
    table = cos_sin_table(YARN, 16)
    radius = (table[:, :half] ** 2 + table[:, half:] ** 2).sqrt()
    torch.testing.assert_close(radius, torch.full_like(radius, factor))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attention_factor": 0.5}, 0.5),
        ({"factor": 1.0}, 1.0),
        ({"factor": math.e, "mscale": 2.0, "mscale_all_dim": 4.0}, 1.2 / 1.4),
    ],
)
def test_yarns_factor_can_be_given(changes: dict[str, Any], expected: float) -> None:
    assert attention_factor(replace(YARN, **changes)) == pytest.approx(expected)


def test_factors_out_of_a_file_divide_the_frequencies() -> None:
    # A pair that turns half as fast is, at twice the position, where it was.
    slower = cos_sin_table(PLAIN, 9, torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(slower[8], cos_sin_table(PLAIN, 5)[4])
