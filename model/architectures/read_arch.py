"""The architecture of a resolved model, whatever its files are. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.architectures.arch import ArchError, ArchSpec
from model.architectures.arch_gguf import from_gguf
from model.architectures.arch_hf import from_hf_config
from model.formats.json_file import read_json_object
from model.gguf_file import read_gguf
from model.weights.source import ModelSource


def read_arch(source: ModelSource) -> ArchSpec:
    """Read the architecture of a resolved model. Raises `ArchError`, `FormatError` or `OSError`."""
    if source.kind == "gguf":
        with naming(source.path):
            return from_gguf(read_gguf(source.path))
    path = source.path if source.kind == "dummy" else source.path / "config.json"
    config, generation = read_json_object(path), path.with_name("generation_config.json")
    has_generation = source.kind != "dummy" and generation.is_file()
    ends = read_json_object(generation) if has_generation else {}
    with naming(path):
        return from_hf_config(config, ends)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name before what is wrong with a key of it."""
    try:
        yield
    except ArchError as error:
        raise type(error)(f"{path.name}: {error}") from error
