"""Reads the architecture of a resolved model, whatever its files are. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from model.architectures import arch_gguf, arch_hf
from model.architectures.arch import ArchError, ArchSpec, ConfigKeys, Family, Shapes
from model.architectures.registry import FAMILIES
from model.formats.json_file import read_json_object, shown
from model.weights.gguf_file import GgufFile, read_gguf
from model.weights.source import ModelSource


def read_arch(source: ModelSource) -> ArchSpec:
    """Read the architecture of a resolved model. Raises `ArchError`, `FormatError` or `OSError`."""
    if source.kind == "gguf":
        return from_gguf(read_gguf(source.path))
    path = source.path if source.kind == "dummy" else source.path / "config.json"
    config, generation = read_json_object(path), path.with_name("generation_config.json")
    has_generation = source.kind != "dummy" and generation.is_file()
    ends = read_json_object(generation) if has_generation else {}
    with _naming(path):
        return from_hf_config(config, ends)


def from_hf_config(
    config: Mapping[str, object], generation_config: Mapping[str, object] | None = None
) -> ArchSpec:
    """Read a config.json, and the generation_config.json beside it for its end-of-sequence ids."""
    family = _family(FAMILIES, "model_type", config.get("model_type"))
    keys = ConfigKeys(config)
    return arch_hf.read_common(family.read_hf(keys), keys, generation_config or {})


def from_gguf(file: GgufFile) -> ArchSpec:
    """Read the architecture off a GGUF file. Raises `ArchError`."""
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    with _naming(file.path):
        return from_gguf_metadata(file.metadata, shapes)


def from_gguf_metadata(metadata: Mapping[str, object], shapes: Shapes) -> ArchSpec:
    """Read the metadata and the tensors' shapes. Raises `ArchError`."""
    name = metadata.get("general.architecture")
    readable = {name: one for name, one in FAMILIES.items() if one.read_gguf}
    family = _family(readable, "general.architecture", name)
    assert family.read_gguf is not None, "it is readable"
    own = {key: value for key, value in metadata.items() if key.startswith(f"{name}.")}
    keys = ConfigKeys(own, prefix=f"{name}.")
    return arch_gguf.read_common(family.read_gguf(keys, shapes), keys, metadata)


def _family(families: Mapping[str, Family], key: str, name: object) -> Family:
    if not isinstance(name, str) or name not in families:
        raise ArchError(f"{key} {shown(name)} is not supported, only {', '.join(families)}")
    return families[name]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name before an error about one of its keys."""
    try:
        yield
    except ArchError as error:
        raise type(error)(f"{path.name}: {error}") from error
