"""Products with the codes of checkpoints, by the kernel in Triton's interpreter."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_checkpoints import WRITERS, Writer, write_awq, write_packed
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.architectures.arch import ConfigKeys
from model.architectures.quantization import read_quantization
from model.cuda.coded_linear import CodedLinear, pack_codes
from model.ops import TorchOps
from model.weights.checkpoints.coded_matrix import CodedMatrix
from model.weights.load import build_transformer
from model.weights.safetensors import SafetensorsWeights

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
#: Groups that the kernel takes: of 32 or more in four bits.
WIDE: dict[str, Writer] = {
    "awq": Writer({**WRITERS["awq"].config, "group_size": 32}, partial(write_awq, group=32)),
    "packed": Writer(
        json.loads(
            json.dumps(WRITERS["packed"].config).replace('"group_size": 16', '"group_size": 32')
        ),
        partial(write_packed, bits=4, symmetric=True, group=32),
    ),
    "gptq whole rows": WRITERS["gptq whole rows"],
    "packed 8 bits": WRITERS["packed 8 bits"],
    "integers": WRITERS["integers"],
    "integers whole": WRITERS["integers whole"],
    "floats": WRITERS["floats"],
    "floats whole": WRITERS["floats whole"],
    # The last block of inputs and of outputs is cut short.
    "fp8 in blocks": WRITERS["fp8 in blocks"],
}


def _coded(folder: Path, writer: Writer, weight: Tensor) -> tuple[CodedMatrix, Tensor]:
    """Return a matrix from its file, and the values that were written."""
    written = writer.write(weight)
    folder.mkdir()
    parts = {f"m.q_proj.{name}": one for name, one in written.parts.items()}
    save_file(parts, folder / "model.safetensors")
    keys = ConfigKeys({"quantization_config": writer.config})
    found = SafetensorsWeights(folder, read_quantization(keys)).coded("m.q_proj.weight")
    assert found is not None
    return found, written.values


def _multiply(linear: CodedLinear, x: Tensor) -> Tensor:
    with np.errstate(over="ignore", invalid="ignore"):
        return linear(x)


@pytest.mark.parametrize("writer", WIDE.values(), ids=WIDE)
@pytest.mark.parametrize("rows", [1, 70])
def test_products_are_those_of_the_values(writer: Writer, rows: int, tmp_path: Path) -> None:
    """Two matrices below each other, as q and k are, with a bias."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, 96, generator=generator) for size in (48, 40)]
    weights[0][:, :32] += 2
    found = [_coded(tmp_path / str(i), writer, one) for i, one in enumerate(weights)]
    values = torch.cat([one for _, one in found])
    bias, x = torch.randn(88, generator=generator), torch.randn(rows, 96, generator=generator)
    linear = pack_codes([one for one, _ in found], bias, torch.float32, CPU)
    assert linear is not None
    expected = x.double() @ values.double().T + bias
    torch.testing.assert_close(_multiply(linear, x).double(), expected, rtol=1e-5, atol=1e-4)
    half = pack_codes([one for one, _ in found], None, torch.float16, CPU)
    assert half is not None
    expected = x.half().double() @ values.double().T
    torch.testing.assert_close(_multiply(half, x.half()).double(), expected, rtol=2e-3, atol=1e-2)


def test_weights_take_the_bits_of_their_codes(tmp_path: Path) -> None:
    matrix, _ = _coded(tmp_path / "m", WIDE["packed"], torch.randn(64, 96))
    linear = pack_codes([matrix], None, torch.bfloat16, CPU)
    assert linear is not None
    assert linear.weight_bytes == 64 * 96 // 2 + 64 * (96 // 32) * 4


def test_every_float_of_eight_bits_is_exact() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0  # NaN
    matrix = CodedMatrix(
        codes.view(torch.float8_e4m3fn).view(16, 16), torch.ones(1, 1), None, (16, 16), 8
    )
    linear = pack_codes([matrix], None, torch.float32, CPU)
    assert linear is not None
    assert torch.equal(_multiply(linear, torch.eye(16)), matrix.codes.float().T)


def test_other_matrices_are_left_to_the_plain_product(tmp_path: Path) -> None:
    weight = torch.randn(48, 80)
    narrow, _ = _coded(tmp_path / "narrow", WRITERS["packed"], weight)
    mixed, _ = _coded(tmp_path / "mixed", WRITERS["gptq desc_act"], weight)
    bytes_, _ = _coded(tmp_path / "bytes", WRITERS["integers"], weight)
    floats, _ = _coded(tmp_path / "floats", WRITERS["floats"], weight)
    for parts in ([narrow], [mixed], [bytes_, floats]):
        assert pack_codes(parts, None, torch.float32, CPU) is None


@pytest.mark.parametrize("quantization", ["auto", "none"])
def test_a_model_is_computed_from_its_codes(
    quantization: str, make_checkpoint: Callable[..., Any], session: Any
) -> None:
    """`--quantization none` widens them instead."""
    writer = WIDE["fp8 in blocks"]
    checkpoint = make_checkpoint("llama")
    file = checkpoint.folder / "model.safetensors"
    tensors, changed = load_file(file), {}
    for name in [one for one in tensors if one.endswith("_proj.weight")]:
        written = writer.write(tensors.pop(name))
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": one for part, one in written.parts.items()}
        changed[name] = written.values
    save_file(tensors, file)
    config = checkpoint.config() | {"quantization_config": writer.config}
    (checkpoint.folder / "config.json").write_text(json.dumps(config))
    checkpoint.load_state(changed)
    packed = []

    def pack_here(parts: Any, bias: Tensor | None) -> CodedLinear | None:
        packed.append(pack_codes(parts, bias, torch.float32, CPU))
        return packed[-1]

    found = build_transformer(
        checkpoint.source,
        quantization=quantization,
        dtype=torch.float32,
        device=CPU,
        ops=TorchOps(),
        progress=False,
        coded=pack_here,
    )
    assert len([one for one in packed if one]) == (4 * 3 if quantization == "auto" else 0)
    tokens = torch.tensor([5, 17, 90, 3])
    if quantization == "auto":
        with np.errstate(over="ignore", invalid="ignore"):
            logits = session(found).feed(tokens)
        # The plain product of the logits has the format that `auto` takes on this CPU.
        torch.testing.assert_close(logits, checkpoint.logits(tokens), rtol=2e-2, atol=2e-2)
        assert "12 products are computed from the codes of the checkpoint" in found.notes
