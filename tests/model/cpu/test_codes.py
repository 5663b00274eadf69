"""Products with weights of 4 to 8 bits, against a plain writer of the layout of their tiles."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import pytest
import torch
from exact_layers import rounded_to_bytes
from torch import Tensor

from model.cpu.instruction_sets import ISAS
from model.cpu.library import DTYPE_CODES, CpuLibrary, load_cpu_library


@pytest.fixture(params=ISAS)
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    found = load_cpu_library(isa=request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Packed:
    """Integer weights: packed, and as the exact values that they stand for."""

    tiles: Tensor
    scales: Tensor
    minimums: Tensor | None
    bits: int
    group_inputs: int
    code_offset: int
    exact: Tensor
    activation_bits: int = 16

    @property
    def description(self) -> ctypes.Array[ctypes.c_int64]:
        minimums = 0 if self.minimums is None else self.minimums.data_ptr()
        values = (
            *(self.tiles.data_ptr(), self.scales.data_ptr(), minimums, 0),
            *(self.bits, self.group_inputs, self.code_offset, DTYPE_CODES[self.scales.dtype]),
            self.activation_bits,
        )
        return (ctypes.c_int64 * 9)(*values)


def _grouped(values: Tensor) -> Tensor:
    """Return `[outputs, scales]` as `[output groups, scales, 16]`."""
    return values.view(-1, 16, values.shape[1]).transpose(1, 2).contiguous()


def _tiled(codes: Tensor, bits: int) -> Tensor:
    """Write the bytes of the tiles as the header of csrc/products.h describes them."""
    groups, inputs = codes.shape[0] // 16, codes.shape[1]
    fours = codes.view(groups, 16, inputs // 64, 16, 4).permute(0, 2, 3, 1, 4).to(torch.uint8)
    if bits == 8:
        return fours.contiguous()
    low = (fours[:, :, 0::2] & 15) | ((fours[:, :, 1::2] & 15) << 4)
    planes = [low]
    if bits > 4:
        together = 8 // (bits - 4)
        high = (fours >> 4).view(groups, inputs // 64, -1, together, 16, 4)
        shifts = torch.arange(together, dtype=torch.uint8) * (bits - 4)
        planes.append((high << shifts[:, None, None]).sum(3).to(torch.uint8))
    return torch.cat(planes, dim=2).contiguous()


def _packed(
    bits: int, group_inputs: int, dtype: torch.dtype, *, has_minimums: bool, inputs: int
) -> Packed:
    outputs, generator = 96, torch.Generator().manual_seed(1)
    low, end = (-128, 128) if bits == 8 else (0, 2**bits)
    codes = torch.randint(low, end, (outputs, inputs), generator=generator)
    offset = 0 if bits == 8 or has_minimums else 2 ** (bits - 1)
    num_scales = -(-inputs // group_inputs)
    scales = _random(outputs, num_scales, seed=2).to(dtype)
    minimums = _random(outputs, num_scales, seed=3).to(dtype) if has_minimums else None
    exact = scales.double().repeat_interleave(group_inputs, 1)[:, :inputs] * (codes - offset)
    if minimums is not None:
        exact += minimums.double().repeat_interleave(group_inputs, 1)[:, :inputs]
        minimums = _grouped(minimums)
    tiles = _tiled(codes, bits)
    return Packed(tiles, _grouped(scales), minimums, bits, group_inputs, offset, exact)


def _product(library: CpuLibrary, packed: Packed, x: Tensor) -> Tensor:
    out = torch.empty(len(x), len(packed.exact))
    library.functions.octavo_product(
        library.kernels, x.data_ptr(), *x.shape, packed.description, out.shape[1], out.data_ptr(), 2
    )
    return out


CASES = [
    (bits, group_inputs, dtype, has_minimums)
    for bits in (4, 5, 6, 8)
    for group_inputs, dtype, has_minimums in (
        (16, torch.float32, False),
        (32, torch.float16, True),
        (32, torch.float16, False),
        (64, torch.float32, True),
        (128, torch.float32, False),
        (192, torch.float16, False),
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_product_is_that_of_the_exact_weights(
    library: CpuLibrary, case: tuple[int, int, torch.dtype, bool]
) -> None:
    bits, group_inputs, dtype, has_minimums = case
    packed = _packed(bits, group_inputs, dtype, has_minimums=has_minimums, inputs=448)
    x = _random(300, 448, seed=4)
    found = _product(library, packed, x)
    exact = x.double() @ packed.exact.T
    # Half a step of the rows, relative to their largest number, added up like a random walk.
    tolerance = 2e-3 if library.multiplies_bfloat16 else 6e-5
    assert (found - exact).norm() <= tolerance * exact.norm()
    for num_rows in (1, 2, 3, 4, 5, 8, 9, 12, 13, 24, 31):
        assert torch.equal(_product(library, packed, x[:num_rows]), found[:num_rows])
    assert torch.equal(_product(library, packed, x[299:])[0], found[299])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_of_bytes_are_rounded_relative_to_32_inputs(
    library: CpuLibrary, case: tuple[int, int, torch.dtype, bool]
) -> None:
    bits, group_inputs, dtype, has_minimums = case
    packed = _packed(bits, group_inputs, dtype, has_minimums=has_minimums, inputs=448)
    packed = replace(packed, activation_bits=8)
    # Of both signs, and in blocks of very different sizes; some blocks are zero.
    x = _random(300, 448, seed=4) * _random(300, 14, seed=5).exp().repeat_interleave(32, 1)
    x[::3, 64:128] = 0
    if library.multiplies_bfloat16:
        x = x.bfloat16().float()
    found = _product(library, packed, x)
    exact = rounded_to_bytes(x) @ packed.exact.T
    assert (found - exact).norm() <= 1e-6 * exact.norm()
    for num_rows in (1, 2, 3, 4, 5, 8, 9, 12, 13, 24, 31):
        assert torch.equal(_product(library, packed, x[:num_rows]), found[:num_rows])
    assert torch.equal(_product(library, packed, x[299:])[0], found[299])


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_no_number_makes_its_row_so_and_no_other(
    library: CpuLibrary, bits: int, activation_bits: int
) -> None:
    packed = _packed(bits, 64, torch.float32, has_minimums=False, inputs=448)
    packed = replace(packed, activation_bits=activation_bits)
    for num_rows in (3, 20):
        x = _random(num_rows, 448)
        x[1, 70], x[2, 300] = torch.nan, torch.inf
        found = _product(library, packed, x)
        assert found[1:3].isnan().all()
        assert found[0].isfinite().all()
        assert found[3:].isfinite().all()
