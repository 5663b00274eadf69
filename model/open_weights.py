"""A resolved model, opened: its architecture and its tensors, one checked against the other."""

from __future__ import annotations

from model.arch import ArchSpec
from model.arch_gguf import from_gguf
from model.dummy_weights import DummyWeights
from model.gguf_file import read_gguf
from model.gguf_weights import ROPE_FACTORS, GgufWeights
from model.read_arch import read_arch
from model.safetensors_weights import SafetensorsWeights
from model.source import ModelSource
from model.weights import WeightSource, check_shapes


def open_weights(source: ModelSource) -> tuple[ArchSpec, WeightSource]:
    """Open a model and check that every tensor is there, whole and of the right shape.

    Raises `WeightsError`, `ArchError`, `GgufError` (each a `ValueError`) or `OSError`.
    """
    arch, weights = _open(source)
    expected = arch.tensor_shapes()
    if ROPE_FACTORS in weights.shapes:
        expected[ROPE_FACTORS] = (arch.rope.rotary_dim // 2,)
    check_shapes(weights, expected)
    return arch, weights


def _open(source: ModelSource) -> tuple[ArchSpec, WeightSource]:
    if source.kind == "gguf":
        file = read_gguf(source.path)
        arch = from_gguf(file)
        return arch, GgufWeights(file, arch)
    arch = read_arch(source)
    if source.kind == "dummy":
        return arch, DummyWeights(arch)
    return arch, SafetensorsWeights(source.path, is_tied=arch.is_tied)
