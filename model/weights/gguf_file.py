"""A model in GGUF, in one file or split into many: its metadata and its directory of tensors.

Free of torch. Knows nothing of the meaning of keys and tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from model.formats import FormatError
from model.formats.gguf import GgufEntry, Value, read_gguf_header, shard_paths


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor's bytes lie."""

    path: Path
    name: str
    #: Row-major, outermost first.
    shape: tuple[int, ...]
    #: ggml's own name: F32, Q4_1, Q6_K...
    type_name: str
    offset_bytes: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The metadata of a model and its directory of tensors."""

    #: Of a split model the first file, which alone has all of the metadata.
    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Read a model's metadata and directory. Raises `FormatError`, or `OSError`."""
    paths = shard_paths(path)
    tensors: dict[str, GgufTensor] = {}
    headers = [read_gguf_header(one) for one in paths]
    metadata = headers[0].metadata
    count = metadata.get("split.count")
    if isinstance(count, int) and count > 1 and count != len(paths):
        raise FormatError(
            f"{path} is one of {count} parts: they lie in one folder, named "
            f"NAME-00001-of-{count:05}.gguf and so on"
        )
    for one, header in zip(paths, headers, strict=True):
        size_bytes = one.stat().st_size
        for entry in header.entries.values():
            if entry.name in tensors:
                other = tensors[entry.name].path
                raise FormatError(f"{one}: tensor {entry.name[:80]} is also in {other.name}")
            tensors[entry.name] = _placed(one, entry, size_bytes)
    return GgufFile(paths[0], metadata, tensors)


def _placed(path: Path, entry: GgufEntry, size_bytes: int) -> GgufTensor:
    name = entry.name[:80]
    try:
        ggml_type = GGMLQuantizationType(entry.type_id)
    except ValueError as error:
        raise FormatError(
            f"{path}: tensor {name} is of the unknown type {entry.type_id}"
        ) from error
    block_items, block_bytes = GGML_QUANT_SIZES[ggml_type]
    if entry.shape and entry.shape[-1] % block_items:
        raise FormatError(
            f"{path}: rows of tensor {name} have {entry.shape[-1]} values, which is no multiple of "
            f"the {block_items} values of a {ggml_type.name} block"
        )
    num_bytes = math.prod(entry.shape) // block_items * block_bytes
    end = entry.offset_bytes + num_bytes
    if end > size_bytes:
        raise FormatError(
            f"{path} is cut off: tensor {name} of shape {list(entry.shape)} ends at byte {end}, "
            f"the file at {size_bytes}"
        )
    return GgufTensor(path, entry.name, entry.shape, ggml_type.name, entry.offset_bytes, num_bytes)
