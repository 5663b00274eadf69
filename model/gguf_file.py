"""The layout of a GGUF file: its metadata and where each tensor's bytes lie. Pure Python.

The `gguf` package's own reader makes four numpy arrays of every string of the vocabulary, which
takes two seconds on a 49k vocabulary; here strings in arrays are stepped over. Knows nothing of
what a tensor means nor of how its blocks are decoded (`model/gguf_weights.py`).

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

Scalar: TypeAlias = str | int | float | bool
#: None: an array of strings, which nobody here reads.
Value: TypeAlias = Scalar | list[Scalar] | None

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4


class GgufError(ValueError):
    """The file is not what GGUF says it should be; the message names the file."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One entry of the file's directory."""

    name: str
    #: Row-major, outermost first (the file has them the other way round).
    shape: tuple[int, ...]
    #: ggml's own name: F32, Q4_1, Q6_K...
    type_name: str
    offset_bytes: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What stands before the weights."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]


class _Cursor:
    """Reads on from an offset. `struct.error` and `IndexError` mean the file ends too early."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.offset = 0

    def scalar(self, layout: struct.Struct) -> int | float | bool:
        (value,) = layout.unpack_from(self._data, self.offset)
        self.offset += layout.size
        assert isinstance(value, int | float)
        return value

    def count(self, layout: struct.Struct = _U64) -> int:
        return int(self.scalar(layout))

    def string(self) -> str:
        length = self.count()
        raw = self._data[self.offset : self.offset + length]
        if len(raw) != length:
            raise IndexError
        self.offset += length
        return raw.decode()

    def value(self) -> Value:
        return self._value_of(self.count(_U32))

    def _value_of(self, kind: int) -> Value:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        item_kind, length = self.count(_U32), self.count()
        if item_kind == _STRING:
            self._skip_strings(length)
            return None
        return [self.scalar(_SCALARS[item_kind]) for _ in range(length)]

    def _skip_strings(self, count: int) -> None:
        data, offset, unpack = self._data, self.offset, _U64.unpack_from
        for _ in range(count):
            offset += 8 + unpack(data, offset)[0]
        self.offset = offset


def read_gguf(path: Path) -> GgufFile:
    """Read the metadata and the directory of a GGUF file. Raises `GgufError`, or `OSError`."""
    with path.open("rb") as file:
        size_bytes = path.stat().st_size
        if size_bytes == 0:
            raise GgufError(f"{path} is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                found = _read(path, _Cursor(data))
            except (struct.error, IndexError) as error:
                raise GgufError(f"{path} is cut off: it ends inside its own header") from error
            except (KeyError, UnicodeDecodeError) as error:
                raise GgufError(f"{path} is damaged: its header holds {error}") from error
    for tensor in found.tensors.values():
        if tensor.offset_bytes + tensor.num_bytes > size_bytes:
            raise GgufError(
                f"{path} is cut off: tensor {tensor.name} of shape {list(tensor.shape)} ends at "
                f"byte {tensor.offset_bytes + tensor.num_bytes}, the file at {size_bytes}"
            )
    return found


def _read(path: Path, cursor: _Cursor) -> GgufFile:
    magic, version = cursor.count(_U32), cursor.count(_U32)
    if magic.to_bytes(4, "little") != b"GGUF":
        raise GgufError(f"{path} is not a GGUF file")
    if version not in {2, 3}:
        raise GgufError(f"{path} has GGUF version {version}; 2 and 3 are supported (little-endian)")
    num_tensors, num_values = cursor.count(), cursor.count()
    metadata = {cursor.string(): cursor.value() for _ in range(num_values)}
    entries = [_read_entry(path, cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise GgufError(f"{path}: general.alignment is {alignment!r}")
    start = -(-cursor.offset // alignment) * alignment
    tensors = {
        entry.name: GgufTensor(
            entry.name, entry.shape, entry.type_name, start + entry.offset_bytes, entry.num_bytes
        )
        for entry in entries
    }
    return GgufFile(path, metadata, tensors)


def _read_entry(path: Path, cursor: _Cursor) -> GgufTensor:
    """One directory entry, its offset still relative to where the tensors start."""
    name, num_dimensions = cursor.string(), cursor.count(_U32)
    if num_dimensions > _MAX_DIMENSIONS:
        raise GgufError(f"{path} is damaged: tensor {name} has {num_dimensions} dimensions")
    shape = tuple(cursor.count() for _ in range(num_dimensions))[::-1]
    kind, offset = cursor.count(_U32), cursor.count()
    try:
        ggml_type = GGMLQuantizationType(kind)
    except ValueError as error:
        raise GgufError(f"{path}: tensor {name} is of the unknown type {kind}") from error
    block_items, block_bytes = GGML_QUANT_SIZES[ggml_type]
    if shape and shape[-1] % block_items:
        raise GgufError(
            f"{path}: rows of tensor {name} have {shape[-1]} values, which is no multiple of the "
            f"{block_items} values of a {ggml_type.name} block"
        )
    num_bytes = math.prod(shape) // block_items * block_bytes
    return GgufTensor(name, shape, ggml_type.name, offset, num_bytes)
