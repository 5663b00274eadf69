"""The architecture of a resolved model, whatever its files are. Free of torch."""

from __future__ import annotations

import json
from pathlib import Path

from model.arch import ArchError, ArchSpec
from model.arch_gguf import from_gguf
from model.arch_hf import from_hf_config
from model.gguf_file import read_gguf
from model.source import ModelSource


def read_arch(source: ModelSource) -> ArchSpec:
    """Read the architecture of a resolved model. Raises `ArchError`, `GgufError` or `OSError`."""
    if source.kind == "gguf":
        return from_gguf(read_gguf(source.path))
    if source.kind == "dummy":
        return from_hf_config(read_json(source.path))
    config = read_json(source.path / "config.json")
    generation = source.path / "generation_config.json"
    return from_hf_config(config, read_json(generation) if generation.is_file() else {})


def read_json(path: Path) -> dict[str, object]:
    """Read a file that holds one JSON object; `ArchError` where it does not."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArchError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ArchError(f"{path} must hold a JSON object")
    return found
