"""The results of every `Ops`, held against the formulas in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from model.cpu.instruction_sets import ISAS
from model.cpu.library import load_cpu_library
from model.cpu.ops import CpuOps
from model.cuda.ops import GpuOps, SinkQueries
from model.ops import Ops, TorchOps

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: 2e-6, F16: 1e-3, BF16: 8e-3}


@pytest.fixture(params=["torch", "triton", *ISAS])
def ops(request: pytest.FixtureRequest) -> Iterator[Ops]:
    if request.param == "torch":
        yield TorchOps()
    elif request.param == "triton":
        # Triton's interpreter computes with numpy, which warns where a GPU gives infinity.
        with np.errstate(over="ignore", invalid="ignore"):
            yield GpuOps()
    elif isinstance(library := load_cpu_library(isa=request.param), str):
        pytest.skip(library)
    else:
        yield CpuOps(library)


def random(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows_for(ops: Ops, rows: int) -> int:
    """Return enough rows for several threads; fewer where each is an interpreted program."""
    return min(rows, 10) if isinstance(ops, GpuOps) else rows


def assert_close(result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=2 * tolerance)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()


DTYPES = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 576), (300, 576), (7, 50), (5, 3, 64)])
def test_rms_norm(ops: Ops, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rows = rows_for(ops, shape[0])
    x, weight = random(rows, *shape[1:], dtype=dtype), random(shape[-1], seed=1)
    assert_close(ops.rms_norm(x, weight, 1e-5, F32), normed(x, weight), F32)
    assert_close(ops.rms_norm(x, weight, 1e-5, dtype), normed(x, weight), dtype)


def test_rms_norm_of_a_view_into_wider_rows(ops: Ops) -> None:
    wide, weight = random(5, 9, 64), random(64, seed=1)
    heads = wide[:, 2:6]
    assert_close(ops.rms_norm(heads, weight, 1e-5, F32), normed(heads, weight), F32)
    columns = wide.view(5, 576)[:, 64:128]
    assert_close(ops.rms_norm(columns, weight, 1e-5, F32), normed(columns, weight), F32)


def test_weights_of_half_precision(ops: Ops) -> None:
    x, weight = random(3, 64), random(64, dtype=BF16, seed=1)
    assert_close(ops.rms_norm(x, weight, 1e-5, F32), normed(x, weight), F32)


@DTYPES
@pytest.mark.parametrize("rows", [1, 200])
def test_add_rms_norm_adds_to_the_residual_in_place(
    ops: Ops, dtype: torch.dtype, rows: int
) -> None:
    rows = rows_for(ops, rows)
    x, residual = random(rows, 576, dtype=dtype), random(rows, 576, seed=1)
    weight = random(576, seed=2)
    total = residual.double() + x.double()
    result = ops.add_rms_norm(x, residual, weight, 1e-5, dtype)
    assert_close(residual, total, F32)
    assert_close(result, normed(total, weight), dtype)


@DTYPES
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (64, 20), (128, 96)])
@pytest.mark.parametrize("tokens", [1, 100])
def test_rope_turns_views_of_one_buffer_in_place(
    ops: Ops, dtype: torch.dtype, head_dim: int, rotary_dim: int, tokens: int
) -> None:
    tokens = rows_for(ops, tokens)
    qkv = random(tokens, 9, head_dim, dtype=dtype)
    before = qkv.double()
    positions = torch.arange(tokens).flip(0) + 3
    angles = torch.arange(tokens + 3).double()[:, None] / 10 ** torch.arange(rotary_dim // 2)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    ops.apply_rope(qkv[:, :6], qkv[:, 6:8], positions, cos_sin)
    turn = torch.polar(torch.ones(()).double(), angles[positions])[:, None]
    first, second = before[:, :8, :rotary_dim].chunk(2, dim=-1)
    turned = torch.complex(first, second) * turn
    expected = before.clone()
    expected[:, :8, :rotary_dim] = torch.cat([turned.real, turned.imag], dim=-1)
    assert_close(qkv, expected, dtype)
    assert torch.equal(qkv[:, 8].double(), before[:, 8])


@DTYPES
@pytest.mark.parametrize("shape", [(1, 3072), (130, 3072), (3, 54)])
def test_silu_and_mul(ops: Ops, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate_up = random(rows_for(ops, shape[0]), shape[1], dtype=dtype) * 4
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_close(ops.silu_and_mul(gate_up), gate * torch.sigmoid(gate) * up, dtype)


def test_silu_at_its_ends(ops: Ops) -> None:
    gate = torch.tensor([[-1e4, -100.0, -87.5, 0.0, 87.5, 1e4, torch.nan]])
    result = ops.silu_and_mul(torch.cat([gate, torch.ones_like(gate)], dim=1))
    expected = torch.tensor([[0.0, 0.0, 0.0, 0.0, 87.5, 1e4, torch.nan]])
    torch.testing.assert_close(result, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_half_precision_is_rounded_as_torch_rounds(ops: Ops, dtype: torch.dtype) -> None:
    """Also the smallest numbers, ties, overflow, infinity and NaN: a norm of one column by 1."""
    if isinstance(ops, GpuOps) and dtype == BF16:
        pytest.skip("Triton's interpreter truncates to bfloat16, where a GPU rounds")
    edge = torch.tensor([1e-8, 5.96e-8, 6.1e-5, 1.00048828125, 1.00146484375, 65519.0, 65520.0])
    values = torch.cat([edge, -edge, random(500), random(500) * 1e-4])
    values = torch.cat([values, torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38])])
    result = ops.rms_norm(torch.ones(1, len(values)), values, 0.0, dtype)
    torch.testing.assert_close(result[0], values.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_a_residual_of_another_kind_is_refused() -> None:
    library = load_cpu_library()
    if isinstance(library, str):
        pytest.skip(library)
    ops = CpuOps(library)
    with pytest.raises(ValueError, match="residual must be float32"):
        ops.add_rms_norm(random(2, 8), random(2, 8, dtype=BF16), random(8), 1e-5, F32)
    assert "compiled" in ops.name


@DTYPES
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 20)])
def test_rotation_fused_with_the_write_to_pages(
    dtype: torch.dtype, head_dim: int, rotary_dim: int
) -> None:
    qkv = random(5, 13, head_dim, dtype=dtype)
    q, k, v = qkv[:, :9], qkv[:, 9:11], qkv[:, 11:]
    cos_sin, positions = random(8, rotary_dim, seed=1), torch.tensor([7, 0, 3, 3, 1])
    slots = torch.tensor([11, 0, 5, 4, 7])
    keys, values = torch.full((2, 3, 4, 2, head_dim), torch.nan, dtype=dtype)
    turned_q, turned_k = q.clone(), k.clone()
    TorchOps().apply_rope(turned_q, turned_k, positions, cos_sin)
    kept = qkv[:, 9:].clone()
    GpuOps().rope_and_store(q, k, v, positions, cos_sin, (keys, values, slots))
    assert_close(q, turned_q.double(), dtype)
    assert torch.equal(qkv[:, 9:], kept)
    for pages, new in ((keys, turned_k), (values, v)):
        flat = pages.flatten(0, 1)
        assert_close(flat[slots], new.double(), dtype)
        rest = torch.ones(len(flat), dtype=torch.bool).index_fill(0, slots, value=False)
        assert flat[rest].isnan().all(), "wrote elsewhere"


def test_a_value_that_is_not_finite_is_stored_as_zero_with_a_key_that_is_not() -> None:
    """As `PagedAttention.store` does it: a weight of zero would keep NaN."""
    qkv = random(4, 4, 32)
    q, k, v = qkv[:, :1], qkv[:, 1:2], qkv[:, 2:3]
    v[1, 0, 31], v[2, 0, 0] = torch.nan, -torch.inf
    keys, values = torch.zeros(2, 1, 4, 1, 32)
    cos_sin, at = random(4, 16, seed=1), torch.arange(4)
    GpuOps().rope_and_store(q, k, v, at, cos_sin, (keys, values, at))
    is_lost = torch.tensor([False, True, True, False])
    assert keys[0].isnan().any(-1).flatten().tolist() == is_lost.tolist()
    wanted = v[:, 0].masked_fill(is_lost[:, None], 0.0)
    assert torch.equal(values[0, :, 0], wanted)


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(32, 32), (24, 16)])
def test_some_queries_are_rotated_a_second_time(head_dim: int, rotary_dim: int) -> None:
    qkv = random(4, 13, head_dim)
    q, k, v = qkv[:, :11], qkv[:, 11:12], qkv[:, 12:]
    cos_sin, held = random(4, rotary_dim, seed=1), random(8, rotary_dim, seed=2)
    own, to_sinks = torch.arange(4), torch.tensor([-1, 7, 0, -1])
    turned, wanted = q.clone(), q[1:3].clone()
    TorchOps().apply_rope(turned, k[:, :0], own, cos_sin)
    TorchOps().apply_rope(wanted, k[1:3, :0], to_sinks[1:3], held)
    sinks = SinkQueries(torch.full(q.shape, torch.nan), to_sinks, held)
    GpuOps().rope_and_store(q, k, v, own, cos_sin, None, sinks)
    assert_close(q, turned.double(), F32)
    assert_close(sinks.q[1:3], wanted.double(), F32)
    assert sinks.q[[0, 3]].isnan().all(), "rotated others"
