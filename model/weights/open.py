"""A resolved model, opened: its architecture and its tensors, one checked against the other."""

from __future__ import annotations

from dataclasses import replace

import torch

from model.architectures.arch import ArchSpec
from model.architectures.read_arch import from_gguf, read_arch
from model.architectures.registry import declare_tensors
from model.weights.dummy import DummyWeights
from model.weights.gguf import ROPE_FACTORS, GgufWeights, read_gguf
from model.weights.interface import WeightsError, WeightSource, check_shapes, say_of_others
from model.weights.safetensors import SafetensorsWeights
from model.weights.source import ModelSource

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def open_weights(source: ModelSource) -> tuple[ArchSpec, WeightSource]:
    """Open a model and check that every tensor is there, whole and of the right shape.

    Raises `WeightsError`, `ArchError`, `FormatError` (each a `ValueError`) or `OSError`.
    """
    if source.kind == "safetensors":
        return _open_folder(source)
    if source.kind == "dummy":
        arch = read_arch(source)
        return arch, DummyWeights(arch)
    file = read_gguf(source.path)
    arch = from_gguf(file)
    weights = GgufWeights(file, arch)
    expected = _shapes(arch)
    if ROPE_FACTORS in weights.shapes:
        expected[ROPE_FACTORS] = (arch.rope.rotary_dim // 2,)
    check_shapes(weights, expected)
    if others := say_of_others(weights, expected):
        raise WeightsError(others)
    return arch, weights


def _open_folder(source: ModelSource) -> tuple[ArchSpec, SafetensorsWeights]:
    """Open safetensors, which may hold more than the config asks for, as `transformers` does."""
    arch = read_arch(source)
    weights = SafetensorsWeights(source.path)
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
    check_shapes(weights, expected)
    if others := say_of_others(weights, expected):
        notes.append(f"{others}: not used")
        weights.leave_out([name for name in weights.shapes if name not in expected])
    return replace(arch, notes=tuple(notes)), weights


def _shapes(arch: ArchSpec) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in declare_tensors(arch).items()}


def _are_equal(weights: SafetensorsWeights, first: str, second: str) -> bool:
    if weights.shapes[first] != weights.shapes.get(second):
        return False
    blocks = zip(weights.blocks(first), weights.blocks(second), strict=True)
    return all(torch.equal(one.float(), other.float()) for one, other in blocks)
