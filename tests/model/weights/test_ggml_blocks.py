from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.weights.ggml_blocks import BLOCK_TYPES
from model.weights.interface import QuantizedRows
from model.weights.quantized_rows import dequantize, group_inputs, is_finite


def _blocks(type_name: str, num_blocks: int, seed: int) -> Tensor:
    """Return random bytes: any codes, and scales that may be NaN, infinite or negative."""
    num_bytes = BLOCK_TYPES[type_name].block_bytes
    found = np.random.default_rng(seed).integers(0, 256, (num_blocks, num_bytes), np.uint8)
    return torch.from_numpy(found)


def _rows(type_name: str, blocks: Tensor, blocks_to_row: int) -> QuantizedRows:
    kind = BLOCK_TYPES[type_name]
    codes, scales, minimums = (
        None if part is None else part.reshape(len(blocks) // blocks_to_row, -1)
        for part in kind.unpack(blocks)
    )
    assert codes is not None
    assert scales is not None
    return QuantizedRows(codes, scales, minimums, kind.bits)


@pytest.mark.parametrize("type_name", BLOCK_TYPES)
@given(seed=st.integers(0, 2**32), blocks_to_row=st.integers(1, 3))
def test_integers_have_the_values_of_the_gguf_package_to_the_bit(
    type_name: str, seed: int, blocks_to_row: int
) -> None:
    blocks = _blocks(type_name, 40 * blocks_to_row, seed)
    kind = gguf.GGMLQuantizationType[type_name]
    with np.errstate(invalid="ignore", over="ignore"):
        expected = gguf.dequantize(blocks.numpy().reshape(40, -1), kind)
    rows = _rows(type_name, blocks, blocks_to_row)
    np.testing.assert_array_equal(dequantize(rows).numpy(), expected)
    assert is_finite(rows) == bool(np.isfinite(expected).all())


@pytest.mark.parametrize("type_name", BLOCK_TYPES)
def test_codes_have_the_bits_and_groups_of_their_type(type_name: str) -> None:
    kind = BLOCK_TYPES[type_name]
    values, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    assert kind.block_bytes == num_bytes
    rows = _rows(type_name, _blocks(type_name, 500, 0), 1)
    assert rows.codes.shape == (500, values)
    assert group_inputs(rows) == kind.group_inputs
    assert (rows.minimums is not None) == kind.has_minimums
    least = 0 if kind.has_minimums else -(2 ** (kind.bits - 1))
    assert (int(rows.codes.min()), int(rows.codes.max())) == (least, least + 2**kind.bits - 1)


@pytest.mark.parametrize("type_name", BLOCK_TYPES)
def test_a_hostile_scale_is_found(type_name: str) -> None:
    blocks = torch.zeros(4, BLOCK_TYPES[type_name].block_bytes, dtype=torch.uint8)
    assert is_finite(_rows(type_name, blocks, 1))
    at = 208 if type_name == "Q6_K" else 0
    blocks[2, at : at + 2] = torch.tensor([math.nan]).half().view(torch.uint8)
    assert not is_finite(_rows(type_name, blocks, 1))
