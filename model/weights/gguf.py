"""A model in GGUF, in one file or split into many: its directory, and its weights decoded.

Blocks are decoded by the `gguf` package, in large pieces (its own entry point cuts them into 16
rows, which takes five times as long). Knows nothing of layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from model.architectures.arch import ArchSpec
from model.architectures.registry import declare_tensors
from model.formats import FormatError
from model.formats.gguf import GgufEntry, Value, read_gguf_header, shard_paths
from model.weights.interface import WeightsError, read_bytes, row_blocks

#: Divisors of rope's frequencies, which only some files have: our name, and that in the file.
ROPE_FACTORS, _FACTORS = "rope_factors", "rope_freqs.weight"

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


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


class GgufWeights:
    """See `WeightSource`: a GGUF file's tensors."""

    def __init__(self, file: GgufFile, arch: ArchSpec) -> None:
        self._path = file.path
        declared = declare_tensors(arch)
        #: By the name in the file; that of safetensors if it is declared, else the same.
        names = {one.gguf_name: name for name, one in declared.items()} | {_FACTORS: ROPE_FACTORS}
        self._tensors = {names.get(name, name): one for name, one in file.tensors.items()}
        self._gguf_names = {name: theirs for theirs, name in names.items()}
        self._shapes = {name: one.shape for name, one in self._tensors.items()}
        self._interleaved = {name for name, one in declared.items() if one.is_interleaved}
        self._head_dim = arch.head_dim

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `WeightSource`."""
        return self._shapes

    def describe(self, name: str) -> str:
        """See `WeightSource`."""
        found = self._tensors.get(name)
        shown = f"{found.name} ({found.type_name})" if found else self._gguf_names[name]
        return f"tensor {shown} in {found.path if found else self._path}"

    def blocks(self, name: str) -> Iterator[Tensor]:
        """See `WeightSource`."""
        tensor = self._tensors[name]
        swap = name in self._interleaved
        row_bytes = tensor.num_bytes // tensor.shape[0]
        with tensor.path.open("rb") as file:
            for start, count in row_blocks(tensor.shape, self._head_dim if swap else 1):
                offset_bytes = tensor.offset_bytes + start * row_bytes
                raw = read_bytes(file, offset_bytes, count * row_bytes)
                rows = self._decode(name, tensor, raw).view(count, *tensor.shape[1:])
                yield _halves_from_neighbours(rows, self._head_dim) if swap else rows

    def _decode(self, name: str, tensor: GgufTensor, raw: Tensor) -> Tensor:
        if plain := _PLAIN.get(tensor.type_name):
            return raw.view(plain)
        kind = GGMLQuantizationType[tensor.type_name]
        try:
            return torch.from_numpy(gguf.dequantize(raw.numpy().reshape(1, -1), kind))
        except NotImplementedError as error:
            raise WeightsError(f"{self.describe(name)}: this type is not supported") from error


def _halves_from_neighbours(rows: Tensor, head_dim: int) -> Tensor:
    """Undo the converter's reordering: within a head, (i, half) becomes (half, i)."""
    rest = rows.shape[1:]
    return rows.view(-1, head_dim // 2, 2, *rest).transpose(1, 2).reshape(-1, *rest)
