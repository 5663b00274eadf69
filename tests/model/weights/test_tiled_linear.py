from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.cpu.instruction_sets import ISAS
from model.cpu.library import CpuLibrary, load_cpu_library
from model.kv.arena import Arena
from model.weights.interface import QuantizedRows
from model.weights.round_integers import by_magnitude
from model.weights.tiled_linear import TiledLinear
from model.weights.tiles import Tiles, pack_floats, pack_integers

#: Whole tiles; neither outputs nor inputs whole; fewer than one tile; more than one slab.
SHAPES = [(96, 128), (50, 70), (5, 3), (8300, 64)]


@pytest.fixture(params=ISAS)
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    found = load_cpu_library(isa=request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _tiles(weight: Tensor, bias: Tensor | None = None, *, scale_tiles: int = 0) -> Tiles:
    if not scale_tiles:
        return pack_floats(weight, bias, Arena())
    rows = by_magnitude(weight, 8, 64 * scale_tiles)
    return pack_integers(rows, bias, Arena(), num_inputs=weight.shape[1])


def _as_it_enters(library: CpuLibrary, x: Tensor) -> Tensor:
    """Return activations as the products read them."""
    return x.bfloat16().double() if library.isa in {"amx", "avx512_bf16"} else x.double()


@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 32, 33, 70])
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_the_exact_product_of_rounded_weights(
    library: CpuLibrary, shape: tuple[int, int], num_rows: int
) -> None:
    weight, bias = _random(*shape), _random(shape[0], seed=1)
    x = _random(num_rows, shape[1], seed=2)
    exact = _as_it_enters(library, x) @ weight.bfloat16().double().T + bias
    found = TiledLinear(_tiles(weight, bias), library)(x)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


def _as_integers(library: CpuLibrary, x: Tensor) -> Tensor:
    """Round to integers of two signed bytes, relative to the largest number of a row.

    Values near half a step must fall on the same side: where there is a fused multiply-add, their
    product with the factor is not rounded before.
    """
    most = torch.tensor(127.0 * 256 + 127)
    largest = x.float().abs().amax(1, keepdim=True)
    is_fused = library.isa not in {"amx", "scalar"}
    factor = (most / largest).double() if is_fused else most / largest
    return (x.to(factor.dtype) * factor).round().double() * (largest / most).double()


@pytest.mark.parametrize("num_rows", [1, 8, 9, 24, 25, 32, 70])
@pytest.mark.parametrize("scale_tiles", [1, 3])
@pytest.mark.parametrize("shape", [*SHAPES, (40, 500)])
def test_int8_is_the_product_of_its_own_rows(
    library: CpuLibrary, shape: tuple[int, int], scale_tiles: int, num_rows: int
) -> None:
    weight, bias = _random(*shape), _random(shape[0], seed=1)
    x = _random(num_rows, shape[1], seed=2)
    # A giant takes the low digits from its own row, and from no other.
    x[0, -1] = 50.0
    tiles = _tiles(weight, bias, scale_tiles=scale_tiles)
    kept = tiles.rows(torch.arange(shape[0])).double()
    exact = _as_integers(library, _as_it_enters(library, x)) @ kept.T + bias
    found = TiledLinear(tiles, library)(x)
    assert ((found - exact).abs().amax(1) <= 1e-5 * exact.abs().amax(1)).all()


@pytest.mark.parametrize("scale_tiles", [1, 2])
def test_int8_keeps_every_weight_to_half_a_step_of_those_it_shares_a_scale_with(
    scale_tiles: int,
) -> None:
    weight = _random(50, 200)
    # A giant coarsens the steps of the inputs that share its scale, and of no others.
    weight[7, 70] = 1000.0
    kept = _tiles(weight, scale_tiles=scale_tiles).rows(torch.arange(50))
    inputs = 64 * scale_tiles
    steps = torch.stack(
        [part.abs().amax(1) / 127 for part in torch.split(weight, inputs, dim=1)], dim=1
    )
    allowed = steps.repeat_interleave(inputs, dim=1)[:, :200] * 0.5001
    assert ((kept - weight).abs() <= allowed).all()


@pytest.mark.parametrize("scale_tiles", [0, 1, 3])
def test_a_row_does_not_depend_on_the_rows_beside_it(library: CpuLibrary, scale_tiles: int) -> None:
    linear = TiledLinear(_tiles(_random(176, 320), scale_tiles=scale_tiles), library)
    x = torch.cat([_random(69, 320, seed=2), 1000 * _random(1, 320, seed=3)])
    together = linear(x)
    for num_rows in (1, 2, 8, 9, 16, 17, 31, 32, 33, 48):
        assert torch.equal(linear(x[:num_rows].contiguous()), together[:num_rows])
    for row in range(0, 70, 23):
        assert torch.equal(linear(x[row : row + 1].contiguous())[0], together[row])


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_result_does_not_depend_on_the_threads(library: CpuLibrary, num_threads: int) -> None:
    linear, x = TiledLinear(_tiles(_random(176, 64)), library), _random(5, 64, seed=2)
    expected, before = linear(x), torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        assert torch.equal(linear(x), expected)
    finally:
        torch.set_num_threads(before)


def test_rows_and_weights_of_zeros_give_zeros(library: CpuLibrary) -> None:
    weight = _random(20, 64)
    weight[3] = 0
    found = TiledLinear(_tiles(weight, scale_tiles=1), library)(
        torch.cat([torch.zeros(1, 64), _random(1, 64, seed=1)])
    )
    assert not found[0].any()
    assert found[1, 3] == 0
    assert found[1].abs().sum() > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scale_tiles", [0, 1])
def test_what_is_no_number_shows_in_its_row_and_in_no_other(
    library: CpuLibrary, scale_tiles: int, bad: float
) -> None:
    linear = TiledLinear(_tiles(_random(20, 64), scale_tiles=scale_tiles), library)
    x = _random(3, 64, seed=1)
    clean = linear(x)
    x[1, 40] = bad
    found = linear(x)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("scale_tiles", [0, 1])
def test_an_embedding_reads_the_rows_of_the_head(scale_tiles: int) -> None:
    weight = _random(50, 70)
    tiles = _tiles(weight, scale_tiles=scale_tiles)
    found = tiles.rows(torch.tensor([49, 0, 17, 17]))
    assert found.shape == (4, 70)
    torch.testing.assert_close(found, weight[[49, 0, 17, 17]], atol=0.02, rtol=0.01)
    if not scale_tiles:
        assert torch.equal(found, weight[[49, 0, 17, 17]].bfloat16().float())


@pytest.mark.parametrize("has_minimums", [False, True])
@pytest.mark.parametrize("group_inputs", [16, 32])
@pytest.mark.parametrize("bits", [4, 5, 6, 8, 16])
def test_a_compiled_look_up_is_that_of_the_tiles(
    library: CpuLibrary, bits: int, group_inputs: int, has_minimums: bool
) -> None:
    outputs, inputs = 50, 352
    if bits == 16:
        tiles = pack_floats(_random(outputs, inputs), None, Arena())
    else:
        codes = (_random(outputs, inputs).abs() * 1000).to(torch.int64) % 2**bits
        factors = _random(outputs, inputs // group_inputs, seed=1)
        rows = QuantizedRows(
            codes.to(torch.uint8), factors, factors.flip(0) if has_minimums else None, bits
        )
        tiles = pack_integers(rows, None, Arena())
    indices = torch.tensor([49, 0, 17, 17, 3])
    torch.testing.assert_close(TiledLinear(tiles, library).rows(indices), tiles.rows(indices))


@pytest.mark.parametrize("index", [-1, 50])
def test_a_row_that_is_not_there_is_refused(library: CpuLibrary, index: int) -> None:
    linear = TiledLinear(_tiles(_random(50, 70), scale_tiles=1), library)
    with pytest.raises(IndexError, match="a row is not below 50"):
        linear.rows(torch.tensor([3, index]))


def test_an_arena_gives_each_its_own() -> None:
    arena = Arena()
    taken = [arena.take((count,), torch.int8) for count in (1, 100, 40_000_000, 64)]
    for mark, one in enumerate(taken):
        one.fill_(mark)
    assert [int(one[0]) for one in taken] == [int(one[-1]) for one in taken] == [0, 1, 2, 3]
    assert all(one.data_ptr() % 64 == 0 for one in taken)
    assert arena.taken_bytes == 64 + 128 + 40_000_000 + 64
    arena.check()
