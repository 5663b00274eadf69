from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.weights.interface import QuantizedRows
from model.weights.quantized_rows import dequantize, group_inputs, join

#: Bits, signed codes, minimums, inputs of a group.
Form = tuple[int, bool, bool, int]
FORMS = list(itertools.product((4, 5, 6, 8), (False, True), (False, True), (16, 32, 128, 256)))


def _rows(form: Form, num_outputs: int = 5, seed: int = 0) -> QuantizedRows:
    bits, is_signed, has_minimums, inputs = form
    generator = torch.Generator().manual_seed(seed)
    least = -(2 ** (bits - 1)) if is_signed else 0
    codes = torch.randint(least, least + 2**bits, (num_outputs, 768), generator=generator)
    scales, minimums = (
        # Halves, so that products and sums with codes are exact in float32.
        torch.randn(num_outputs, 768 // inputs, generator=generator).half().float()
        for _ in range(2)
    )
    dtype = torch.int8 if is_signed else torch.uint8
    return QuantizedRows(codes.to(dtype), scales, minimums if has_minimums else None, bits)


@given(st.lists(st.sampled_from(FORMS), min_size=1, max_size=3))
def test_joined_parts_keep_their_values(forms: list[Form]) -> None:
    parts = [_rows(form, 2 + at, at) for at, form in enumerate(forms)]
    joined = join(parts)
    assert joined is not None
    expected = torch.cat([dequantize(part) for part in parts])
    # A code that moves by half of its range rounds the sum with a minimum, in float32.
    assert ((dequantize(joined) - expected).abs() <= 2.0**-20 * expected.abs().max()).all()


@given(st.lists(st.sampled_from(FORMS), min_size=1, max_size=3))
def test_joined_parts_have_the_form_of_the_tiles(forms: list[Form]) -> None:
    joined = join([_rows(form) for form in forms])
    assert joined is not None
    assert joined.bits == max(bits for bits, *_ in forms)
    assert group_inputs(joined) == min(128, *(inputs for *_, inputs in forms))
    is_signed = joined.codes.dtype == torch.int8
    assert is_signed or joined.bits < 8
    assert not is_signed or joined.bits == 8 or joined.minimums is None
    if not is_signed:
        assert int(joined.codes.max()) < 2**joined.bits


@pytest.mark.parametrize("form", [(4, True, False, 32), (5, False, True, 16), (8, True, True, 64)])
def test_rows_in_the_form_of_the_tiles_are_not_copied(form: Form) -> None:
    rows = _rows(form)
    joined = join([rows])
    assert joined is not None
    assert joined.codes.data_ptr() == rows.codes.data_ptr()
    assert joined.scales.data_ptr() == rows.scales.data_ptr()


def test_groups_of_fewer_than_sixteen_inputs_are_not_supported() -> None:
    assert join([_rows((4, True, False, 8))]) is None
    assert join([_rows((4, True, False, 32)), _rows((4, True, False, 24))]) is None
