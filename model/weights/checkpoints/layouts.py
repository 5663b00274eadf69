"""The supported layouts of quantized matrices, by name."""

from __future__ import annotations

from model.formats.quantization import Layout, MatrixFormat
from model.weights.checkpoints.awq import AwqLayout
from model.weights.checkpoints.byte_codes import ByteLayout
from model.weights.checkpoints.gptq import GptqLayout
from model.weights.checkpoints.interface import MatrixLayout
from model.weights.checkpoints.packed import PackedLayout

LAYOUTS: dict[Layout, MatrixLayout] = {
    "awq": AwqLayout(),
    "gptq": GptqLayout(zeros_are_less_one=True),
    "gptq_v2": GptqLayout(zeros_are_less_one=False),
    "packed": PackedLayout(),
    "integers": ByteLayout("I8"),
    "floats": ByteLayout("F8_E4M3"),
}


def layout_of(fmt: MatrixFormat) -> MatrixLayout:
    """Return the layout of a format."""
    return LAYOUTS[fmt.layout]
