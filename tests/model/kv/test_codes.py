"""The codes of keys and values, against their definitions in plain Python numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.kv.codes import (
    bfloat16_up,
    decode_latent,
    encode_latent,
    hadamard,
)
from model.kv.format import CODED_FORMATS, KV_FORMATS, KVFormat
from model.kv.page_codes import PageCoding

INT8, FP8, INT4 = (KV_FORMATS[name] for name in ("int8", "fp8", "int4"))
_DIM = 64


def _f32(x: float) -> float:
    """Return a quotient, difference or product of two float32 as float32 has it."""
    return float(np.float32(x))


def _bf16(x: float, towards: Callable[[float], int]) -> float:
    """Round to the 8 bits of bfloat16: `math.ceil` or `math.floor`, in whole steps."""
    step = 2.0 ** max(math.frexp(x)[1] - 8, -133)
    return towards(x / step) * step


def _e4m3(x: float) -> float:
    """Round to the 4 bits of float8_e4m3fn, half to even."""
    step = 2.0 ** max(math.frexp(x)[1] - 4, -9)
    return round(x / step) * step


def _symmetric(
    x: list[float], largest: int, rounded: Callable[[float], float]
) -> tuple[list[float], float]:
    if not all(map(math.isfinite, x)):
        return [0.0] * len(x), math.nan
    scale = _bf16(_f32(max(map(abs, x)) / largest), math.ceil)
    steps = [_f32(one / scale) if scale else 0.0 for one in x]
    return [rounded(min(max(one, -largest), largest)) for one in steps], scale


def _asymmetric(x: list[float], largest: int = 15) -> tuple[list[float], float, float]:
    """Encode a vector that is rotated already."""
    if not all(map(math.isfinite, x)):
        return [0.0] * len(x), math.nan, 0.0
    least = _bf16(min(x), math.floor)
    scale = _bf16(_f32(_f32(max(x) - least) / largest), math.ceil)
    steps = [_f32(_f32(one - least) / scale) if scale else 0.0 for one in x]
    return [float(min(max(round(one), 0), largest)) for one in steps], scale, least


def _vectors() -> dict[str, Tensor]:
    """Return `[vectors, 64]` each."""
    draw = torch.Generator().manual_seed(3)
    normal = torch.randn(8, _DIM, generator=draw)
    one_large, one_inf, one_nan = normal.clone(), normal.clone(), normal.clone()
    one_large[:, 17] *= 20
    one_inf[::2, 5], one_inf[1::2, 63] = torch.inf, -torch.inf
    one_nan[:, 40] = torch.nan
    halves = torch.arange(_DIM) / 2 - 8.0
    return {
        "normal": normal,
        "halves of a step": torch.stack((halves.index_fill(0, torch.tensor(0), 127.0), halves)),
        "positive": normal.abs() + 3,
        "one large channel": one_large,
        "constant": torch.full((2, _DIM), -3.3) * torch.tensor([[1.0], [-7.0]]),
        "zero": torch.zeros(1, _DIM),
        "zeros of both signs": torch.zeros(1, _DIM).index_fill(1, torch.tensor([3, 9]), -0.0),
        "huge": normal * 1e37,
        "tiny": normal * 1e-36,
        "below the smallest normal number": normal * 1e-39,
        "infinite": one_inf,
        "NaN": one_nan,
    }


VECTORS = _vectors()


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("kv_format", [INT8, FP8], ids=lambda one: one.name)
def test_symmetric_codes_are_those_of_the_definition(kv_format: KVFormat, name: str) -> None:
    codes, scales = kv_format.encode(VECTORS[name])
    assert (codes.dtype, scales.dtype) == (kv_format.storage, torch.bfloat16)
    largest, rounded = (127, round) if kv_format is INT8 else (448, _e4m3)
    for x, found, scale in zip(VECTORS[name], codes, scales, strict=True):
        rotated = hadamard(x) if kv_format is INT8 else x
        wanted, wanted_scale = _symmetric(rotated.tolist(), largest, rounded)
        assert found.float().tolist() == wanted
        assert scale.item() == pytest.approx(wanted_scale, rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("name", VECTORS)
def test_codes_of_four_bits_are_those_of_the_definition(name: str) -> None:
    codes, scales = INT4.encode(VECTORS[name])
    assert (codes.dtype, scales.dtype) == (torch.uint8, torch.bfloat16)
    for x, found, (scale, least) in zip(VECTORS[name], codes, scales.tolist(), strict=True):
        wanted, wanted_scale, wanted_least = _asymmetric(hadamard(x).tolist())
        pairs = [(byte % 16, byte // 16) for byte in found.tolist()]
        assert list(chain.from_iterable(pairs)) == wanted
        assert scale == pytest.approx(wanted_scale, rel=0, abs=0, nan_ok=True)
        assert math.copysign(1, least) == math.copysign(1, wanted_least) or least != 0
        assert least == wanted_least


@pytest.mark.parametrize("kv_format", CODED_FORMATS, ids=lambda one: one.name)
def test_what_is_decoded_is_near_what_was_encoded(kv_format: KVFormat) -> None:
    """Relative errors of a head with a normal distribution, and beside a channel of 20 sigma."""
    allowed, beside_large = {"int8": (7e-3, 0.06), "fp8": (0.03, 0.06), "int4": (0.11, 0.25)}[
        kv_format.name
    ]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, _DIM, generator=draw)
    decoded = kv_format.decode(*kv_format.encode(x))
    assert decoded.dtype == torch.float32
    assert (decoded - x).square().mean().sqrt() < allowed
    x[..., 9] = 20
    decoded = kv_format.decode(*kv_format.encode(x))
    assert (decoded - x)[..., :9].square().mean().sqrt() < beside_large


@pytest.mark.parametrize("kv_format", CODED_FORMATS, ids=lambda one: one.name)
def test_a_vector_that_is_not_finite_is_nan_and_others_are_as_without_it(
    kv_format: KVFormat,
) -> None:
    x = VECTORS["normal"].clone()
    alone = kv_format.decode(*kv_format.encode(x))
    x[2, 3], x[5, 60] = torch.nan, -torch.inf
    decoded = kv_format.decode(*kv_format.encode(x))
    for index in range(len(x)):
        if index in {2, 5}:
            assert decoded[index].isnan().all()
        else:
            assert torch.equal(decoded[index], alone[index])


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**20),
    cut=st.integers(0, 12),
    dim=st.sampled_from([2, 32, 80, 96, 128]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_no_cut_of_a_batch_changes_a_code(
    seed: int, cut: int, dim: int, dtype: torch.dtype
) -> None:
    x = torch.randn(12, 3, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for kv_format in CODED_FORMATS:
        whole = [one.view(torch.uint8) for one in kv_format.encode(x)]
        parts = zip(kv_format.encode(x[:cut]), kv_format.encode(x[cut:]), strict=True)
        for plane, halves in zip(whole, parts, strict=True):
            assert torch.equal(plane, torch.cat([one.view(torch.uint8) for one in halves]))


@pytest.mark.parametrize("bits", [2, 4])
def test_a_page_is_encoded_by_channel_and_by_token(bits: int) -> None:
    """Codes, scales and minima of each channel of the keys, and of each group of a value."""
    coding = PageCoding(bits, group=8)
    pages, size, heads, dim = 2, 6, 3, 24
    draw = torch.Generator().manual_seed(4)
    keys, values = torch.randn(2, pages, size, heads, dim, generator=draw)
    keys[..., 5] *= 20
    planes = coding.encode(keys, values)
    wanted = coding.planes(size, heads, dim)
    assert [(tuple(one.shape[1:]), one.dtype) for one in planes] == wanted
    read_keys, read_values = coding.decode(*planes)
    key_scales, value_scales = planes[2:]
    for page, head in product(range(pages), range(heads)):
        for channel in range(dim):
            codes, *numbers = _asymmetric(keys[page, :, head, channel].tolist(), 2**bits - 1)
            assert key_scales[page, head, channel].tolist() == numbers
            assert read_keys[page, :, head, channel].tolist() == _read(codes, *numbers)
        for token, group in product(range(size), range(3)):
            part = slice(8 * group, 8 * group + 8)
            codes, *numbers = _asymmetric(values[page, token, head, part].tolist(), 2**bits - 1)
            assert value_scales[page, token, head, group].tolist() == numbers
            assert read_values[page, token, head, part].tolist() == _read(codes, *numbers)


def _read(codes: list[float], scale: float, least: float) -> list[float]:
    """Decode, rounded to float32 and then to bfloat16."""
    return torch.tensor([_f32(code * scale + least) for code in codes]).bfloat16().tolist()


@pytest.mark.parametrize("dim", [1, 2, 64, 80, 96, 128, 27])
def test_the_rotation_is_a_hadamard_matrix_a_block_and_its_own_inverse(dim: int) -> None:
    block = math.gcd(dim, 2**10)
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    matrix = torch.kron(torch.eye(dim // block), torch.tensor(signs)).double() / block**0.5
    x = torch.randn(5, dim, generator=torch.Generator().manual_seed(1))
    rotated = hadamard(x)
    assert rotated.dtype == torch.float32
    torch.testing.assert_close(rotated.double(), x.double() @ matrix, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hadamard(rotated), x, rtol=1e-6, atol=1e-6)


def test_scales_are_rounded_up() -> None:
    x = torch.tensor([1.0, 1.00390625, 1.0078125, -1.00390625, -1.0, 0.0, 3e-41, 254 / 127])
    up = [1.0, 1.0078125, 1.0078125, -1.0, -1.0, 0.0]
    assert bfloat16_up(x)[:6].tolist() == up
    assert (bfloat16_up(x).double() >= x.double()).all()


@settings(max_examples=10)
@given(vectors=st.integers(1, 3), latent_dim=st.sampled_from([8, 96, 512]), seed=st.integers(0, 9))
def test_a_latent_vector_has_a_scale_to_128_elements_and_a_rotated_part_in_16_bits(
    vectors: int, latent_dim: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.logspace(-3, 3, vectors)[:, None]
    x = magnitudes * torch.randn(vectors, latent_dim + 6, generator=generator)
    codes, beside = encode_latent(x, latent_dim)
    found = decode_latent(codes, beside, latent_dim)
    assert torch.equal(found[:, latent_dim:], x[:, latent_dim:].bfloat16().float())
    group = {8: 8, 96: 32, 512: 128}[latent_dim]
    assert beside.shape == (vectors, latent_dim // group + 6)
    for first in range(0, latent_dim, group):
        part = slice(first, first + group)
        for vector, decoded in zip(x[:, part], found[:, part], strict=True):
            steps, scale = _symmetric(vector.tolist(), 127, round)
            assert decoded.tolist() == [_f32(step * scale) for step in steps]
