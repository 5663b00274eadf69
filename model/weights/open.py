"""A resolved model, opened: its architecture and its tensors, one checked against the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from model.architectures.arch import ArchSpec
from model.architectures.read_arch import from_gguf, read_arch
from model.architectures.registry import declare_tensors
from model.weights.dummy import DummyWeights
from model.weights.gguf import ROPE_FACTORS, GgufWeights
from model.weights.gguf_file import read_gguf
from model.weights.interface import QuantizedWeightsError, WeightsError, WeightSource
from model.weights.safetensors import SafetensorsWeights
from model.weights.source import ModelSource

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def open_weights(source: ModelSource) -> tuple[ArchSpec, WeightSource]:
    """Open a model and check that every tensor is there, whole and of the right shape.

    Raises `WeightsError`, `ArchError`, `FormatError` (each a `ValueError`) or `OSError`.
    """
    if source.kind == "gguf":
        file = read_gguf(source.path)
        arch = from_gguf(file)
        weights = GgufWeights(file, arch)
        expected = _shapes(arch)
        if ROPE_FACTORS in weights.shapes:
            expected[ROPE_FACTORS] = (arch.rope.rotary_dim // 2,)
        if others := _check(weights, expected):
            raise WeightsError(others)
        return arch, weights
    arch = read_arch(source)
    if source.kind == "dummy":
        return _with_note(arch, "random weights are plain, and not quantized"), DummyWeights(arch)
    try:
        return _open_folder(source.path, arch)
    except WeightsError as error:
        if arch.quantization is None:
            raise
        raise QuantizedWeightsError(str(error)) from error


def _with_note(arch: ArchSpec, note: str) -> ArchSpec:
    """Add a note where the config is that of a quantized checkpoint."""
    return replace(arch, notes=(*arch.notes, note)) if arch.quantization else arch


def _open_folder(folder: Path, arch: ArchSpec) -> tuple[ArchSpec, SafetensorsWeights]:
    """Open safetensors, which may hold more than the config asks for, as `transformers` does."""
    weights = SafetensorsWeights(folder, arch.quantization)
    notes = [*arch.notes, *weights.notes]
    if arch.is_tied and _HEAD in weights.shapes:
        if _EMBEDDING not in weights.shapes:
            # Some trainers save of a pair that shares its memory the one that sorts first.
            weights.rename(_HEAD, _EMBEDDING)
            notes.append(f"{_EMBEDDING} is not there, and tied to {_HEAD}: that is taken")
        elif _are_equal(weights, _HEAD, _EMBEDDING):
            weights.leave_out([_HEAD])
        else:
            arch = replace(arch, is_tied=False)
            notes.append(f"tie_word_embeddings is true, but {_HEAD} is another: it is used")
    expected = _shapes(arch)
    if others := _check(weights, expected):
        notes.append(f"{others}: not used")
        weights.leave_out(weights.shapes.keys() - expected.keys())
    return replace(arch, notes=tuple(notes)), weights


def _shapes(arch: ArchSpec) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in declare_tensors(arch).items()}


def _check(source: WeightSource, expected: Mapping[str, tuple[int, ...]]) -> str:
    """Compare the expected tensors with those of the source; describe the others, if any.

    Raises `WeightsError`.
    """
    found = source.shapes
    for name, shape in expected.items():
        if name not in found:
            raise WeightsError(f"{source.describe(name)} is missing; it should be {list(shape)}")
        if found[name] != shape:
            raise WeightsError(
                f"{source.describe(name)} has shape {list(found[name])}, "
                f"the config asks for {list(shape)}"
            )
    others = [name for name in found if name not in expected]
    if not others:
        return ""
    return (
        f"{source.describe(others[0])} of shape {list(found[others[0]])} has no place in "
        f"this architecture ({len(others)} such tensors)"
    )


def _are_equal(weights: SafetensorsWeights, first: str, second: str) -> bool:
    if weights.shapes[first] != weights.shapes.get(second):
        return False
    blocks = zip(weights.blocks(first), weights.blocks(second), strict=True)
    return all(torch.equal(one.float(), other.float()) for one, other in blocks)
