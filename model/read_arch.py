"""The architecture of a resolved model, whatever its files are. Free of torch."""

from __future__ import annotations

from model.arch import ArchSpec
from model.arch_gguf import from_gguf
from model.arch_hf import from_hf_config
from model.formats.json_file import read_json_object
from model.gguf_file import read_gguf
from model.source import ModelSource


def read_arch(source: ModelSource) -> ArchSpec:
    """Read the architecture of a resolved model. Raises `ArchError`, `FormatError` or `OSError`."""
    if source.kind == "gguf":
        return from_gguf(read_gguf(source.path))
    if source.kind == "dummy":
        return from_hf_config(read_json_object(source.path))
    config = read_json_object(source.path / "config.json")
    generation = source.path / "generation_config.json"
    return from_hf_config(config, read_json_object(generation) if generation.is_file() else {})
