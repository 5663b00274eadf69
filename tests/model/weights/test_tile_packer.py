"""Packing row by row gives the tiles that torch makes of a whole weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.cpu.instruction_sets import ISAS
from model.cpu.library import CpuLibrary, load_cpu_library
from model.kv.arena import Arena
from model.weights.interface import QuantizedRows
from model.weights.quantized_rows import form_of, join, rows_of
from model.weights.round_integers import Rounding
from model.weights.tile_packer import CodePacker, TilePacker
from model.weights.tiles import Tiles, pack_floats, pack_integers

ROUNDINGS = [
    None,
    Rounding(8, 128),
    Rounding(8, 64),
    Rounding(6, 32),
    Rounding(5, 32),
    Rounding(4, 32, is_searched=True),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(scope="module", params=ISAS)
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    found = load_cpu_library(isa=request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def _weight(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Outputs of very different sizes: scales that no float16 holds, too.
    sizes = 10.0 ** torch.randint(-12, 3, (shape[0], 1), generator=generator)
    return torch.randn(*shape, generator=generator) * sizes


def _by_torch(weight: Tensor, rounding: Rounding | None, bias: Tensor | None) -> Tiles:
    if rounding is None:
        return pack_floats(weight, bias, Arena())
    return pack_integers(rounding(weight), bias, Arena(), num_inputs=weight.shape[1])


def assert_same(found: Tiles, expected: Tiles) -> None:
    assert found.part.keys() == expected.part.keys()
    for name, value in expected.part.items():
        other = found.part[name]
        if isinstance(value, Tensor):
            assert isinstance(other, Tensor)
            assert other.dtype == value.dtype, name
            assert torch.equal(other, value), name
        else:
            assert other == value, name


@given(data=st.data())
def test_rows_in_any_pieces_give_the_tiles_of_the_whole(
    library: CpuLibrary, data: st.DataObject
) -> None:
    num_outputs = data.draw(st.sampled_from((5, 16, 37, 64)))
    num_inputs = data.draw(st.sampled_from((3, 70, 128, 200)))
    weight = _weight(num_outputs, num_inputs).to(data.draw(st.sampled_from(DTYPES)))
    weight = weight.nan_to_num()  # Infinite in float16.
    rounding = data.draw(st.sampled_from(ROUNDINGS))
    bias = data.draw(st.sampled_from((None, torch.arange(float(num_outputs)))))
    packer = TilePacker((num_outputs, num_inputs), rounding, Arena(), library)
    # Parts of one product, each in blocks.
    cut = data.draw(st.integers(0, num_outputs))
    for part in (weight[:cut], weight[cut:]):
        assert packer.add(torch.split(part, data.draw(st.integers(1, 40))))
    assert_same(packer.tiles(bias), _by_torch(weight, rounding, bias))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("row", [3, 17])
def test_values_that_are_not_finite_are_found_and_stay_in_their_output(
    library: CpuLibrary, rounding: Rounding | None, bad: float, row: int
) -> None:
    weight = _weight(20, 130)
    weight[row, 100] = bad
    packer = TilePacker((20, 130), rounding, Arena(), library)
    assert not packer.add([weight])
    tiles = packer.tiles(None)
    is_finite = tiles.rows(torch.arange(20)).isfinite().all(1)
    assert is_finite.tolist() == [output != row for output in range(20)]


def test_only_the_part_with_the_value_is_blamed(library: CpuLibrary) -> None:
    """Rows of two matrices share an output group."""
    weight = _weight(24, 64)
    weight[10, 3] = float("nan")
    packer = TilePacker((24, 64), Rounding(8, 128), Arena(), library)
    assert [packer.add([part]) for part in torch.split(weight, 8)] == [True, False, True]


def test_missing_rows_are_a_fault(library: CpuLibrary) -> None:
    packer = TilePacker((20, 64), None, Arena(), library)
    packer.add([_weight(19, 64)])
    with pytest.raises(AssertionError, match="19 of 20 rows"):
        packer.tiles(None)


@given(data=st.data())
def test_integers_of_a_file_are_packed_as_torch_packs_them(
    library: CpuLibrary, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw_part(num_outputs: int) -> QuantizedRows:
        bits = data.draw(st.sampled_from((4, 5, 6, 8)))
        codes = torch.randint(0, 2**bits, (num_outputs, 192), dtype=torch.uint8)
        if bits == 8 or data.draw(st.booleans()):
            codes = (codes - 2 ** (bits - 1)).view(torch.int8)
        shape = 2, num_outputs, data.draw(st.sampled_from((3, 6, 12)))
        scales, minimums = torch.rand(*shape, generator=generator)
        return QuantizedRows(codes, scales, minimums if data.draw(st.booleans()) else None, bits)

    parts = [draw_part(num_outputs) for num_outputs in (37, 16, 3)]
    form, bias = form_of(parts), torch.arange(56.0)
    assert form is not None
    packer = CodePacker((56, 192), form, Arena(), library)
    step = data.draw(st.integers(1, 40))
    for part in parts:
        starts = range(0, len(part.codes), step)
        assert packer.add(rows_of(part, slice(start, start + step)) for start in starts)
    whole = join(parts)
    assert whole is not None
    assert_same(packer.tiles(bias), pack_integers(whole, bias, Arena()))


def test_scales_that_are_not_finite_are_found(library: CpuLibrary) -> None:
    rows = QuantizedRows(torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 2), None, 8)
    form = form_of([rows])
    assert form is not None
    packer = CodePacker((8, 64), form, Arena(), library)
    assert packer.add([rows])
    rows.scales[1, 1] = float("inf")
    assert not packer.add([rows])
