from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from model.weights.format_choice import choose_format
from model.weights.linear import (
    Format,
    Linear,
    PlainLinear,
    head_format,
    pack,
    staging_dtype,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
#: Largest error relative to the largest result: a few roundings of 2**-24, 2**-11, 2**-8, 2**-7.
BOUNDS: dict[Format, float] = {"none": 3e-6, "fp16": 1e-3, "bf16": 1.5e-2, "int8": 3e-2}


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _pack(weight: Tensor, bias: Tensor | None, fmt: Format) -> Linear:
    """Pack copies, or skip where this machine lacks the format."""
    try:
        choose_format(fmt, CPU, torch.float32)
    except ValueError as reason:
        pytest.skip(str(reason))
    dtype = staging_dtype(fmt, torch.float32)
    copied = weight.to(dtype, copy=True)
    return pack(copied, None if bias is None else bias.to(dtype, copy=True), fmt)


@pytest.mark.parametrize("num_rows", [1, 3, 8, 33])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("fmt", BOUNDS)
def test_a_format_is_as_exact_as_it_says(fmt: Format, has_bias: bool, num_rows: int) -> None:
    weight, bias = _random(70, 200), _random(70, seed=1) if has_bias else None
    x = _random(num_rows, 200, seed=2)
    exact = x.double() @ weight.double().T
    if bias is not None:
        exact += bias
    linear = _pack(weight, bias, fmt)
    found = linear(x.to(linear.in_dtype))
    assert found.dtype == linear.out_dtype
    assert found.shape == (num_rows, 70)
    assert (found.double() - exact).abs().max() <= BOUNDS[fmt] * exact.abs().max()


@pytest.mark.parametrize("fmt", ["fp16", "bf16", "int8"])
def test_a_row_does_not_depend_on_the_rows_beside_it(fmt: Format) -> None:
    linear = _pack(_random(96, 576), None, fmt)
    # One row is a thousand times the others: it must not coarsen their steps.
    x = torch.cat([_random(16, 576, seed=2), 1000 * _random(1, 576, seed=3)]).to(linear.in_dtype)
    together = linear(x)
    for row in range(17):
        assert torch.equal(linear(x[row : row + 1].contiguous())[0], together[row])


def test_int8_takes_rows_of_zeros_and_rows_of_weights_of_zeros() -> None:
    weight = _random(8, 64)
    weight[3] = 0
    linear = _pack(weight, None, "int8")
    found = linear(torch.cat([torch.zeros(1, 64), _random(1, 64, seed=1)]))
    assert not found[0].any()
    assert found[1, 3] == 0
    assert found[1].abs().sum() > 0


def test_int8_does_not_overflow_at_its_largest_values() -> None:
    # Where pairs of products are added in 16 bits, two full-scale ones would be cut off.
    found = _pack(torch.ones(16, 512), None, "int8")(torch.ones(4, 512))
    torch.testing.assert_close(found, torch.full((4, 16), 512.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("fmt", BOUNDS)
def test_the_memory_of_packed_weights_is_told(fmt: Format) -> None:
    weight = _random(64, 1024)
    width = {"none": 4, "fp16": 2, "bf16": 2, "int8": 1}[fmt]
    packed_bytes = _pack(weight, None, fmt).weight_bytes
    assert packed_bytes == pytest.approx(weight.numel() * width, rel=0.02)


def test_fp16_tells_its_padding_too() -> None:
    assert _pack(_random(16, 576), None, "fp16").weight_bytes == 16 * 1024 * 2


def test_the_plain_product_shares_its_weights() -> None:
    weight = _random(5, 4)
    linear = PlainLinear(weight, None)
    weight.zero_()
    assert not linear(_random(2, 4)).any()


def test_the_last_product_gives_float32_in_every_format() -> None:
    formats: tuple[Format, ...] = ("none", "fp16", "bf16", "int8")
    assert [head_format(fmt) for fmt in formats] == ["none", "fp16", "fp16", "int8"]
    for fmt in {head_format(one) for one in formats}:
        assert _pack(_random(8, 16), None, fmt).out_dtype == torch.float32


def test_auto_takes_something_that_runs_and_says_what() -> None:
    fmt, note = choose_format("auto", CPU, torch.float32, num_inputs=64)
    assert fmt in note
    assert fmt != "int8", "eight bits are not near-lossless"
    assert _pack(_random(8, 16), None, fmt).weight_bytes > 0


def test_a_lesser_cpu_is_given_fp16() -> None:
    """`ATEN_CPU_CAPABILITY` is read once a process, so another process reads it."""
    script = (
        "import torch; from model.weights.format_choice import choose_format as c;"
        "cpu = torch.device('cpu'); print(c('auto', cpu, torch.float32)[0]);"
        "c('bf16', cpu, torch.float32)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"ATEN_CPU_CAPABILITY": "avx2", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    if "fbgemm" in torch.backends.quantized.supported_engines:
        assert done.stdout.strip() == "fp16"
    assert "bf16 needs a CPU with AVX-512" in done.stderr


def test_a_gpu_computes_in_the_dtype_of_the_activations() -> None:
    assert choose_format("auto", CUDA, torch.bfloat16) == ("none", "weights in bfloat16")
    assert staging_dtype("none", torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize(
    ("quantization", "device", "dtype", "message"),
    [
        (
            "int3",
            CPU,
            torch.float32,
            "quantization must be one of auto, none, fp16, bf16, int8, int4",
        ),
        ("int4", CPU, torch.float32, "int4 does not run here: it needs the compiled CPU op"),
        ("own", CPU, torch.float32, "quantization own is for files of integers; this one has n"),
        ("int8", CUDA, torch.float16, "quantization int8 is for CPUs"),
        ("none", CPU, torch.bfloat16, "dtype on a CPU is float32, got bfloat16"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    quantization: str, device: torch.device, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_format(quantization, device, dtype)
