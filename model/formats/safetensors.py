"""The headers of safetensors files, and the index of a model in many files. Free of torch.

A file is an 8-byte length, a JSON header and the tensors' bytes. Each length in the header is
compared with the file's size. Knows nothing of the meaning of tensors.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from model.formats import FormatError
from model.formats.json_file import parse_json_object, read_json_object, shown

#: Of the types whose sizes are checked: others are not read.
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64"), 8),
    **dict.fromkeys(("F32", "I32"), 4),
    **dict.fromkeys(("F16", "BF16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E8M0", "I8", "U8"), 1),
}
#: The limit of the format's own library.
_MAX_HEADER_BYTES = 100_000_000
#: Of a file's name, on any file system.
_MAX_NAME_BYTES = 255


@dataclass(frozen=True, slots=True)
class SafetensorsEntry:
    """A tensor of a header."""

    path: Path
    shape: tuple[int, ...]
    dtype_name: str
    #: From the beginning of the file.
    offset_bytes: int


def read_safetensors_header(path: Path) -> dict[str, SafetensorsEntry]:
    """Read the header of one file. Raises `FormatError`, or `OSError`."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        start_bytes = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start_bytes <= size_bytes:
            raise FormatError(f"{path} is cut off, or no safetensors file")
        if start_bytes - 8 > _MAX_HEADER_BYTES:
            raise FormatError(f"{path} is damaged: a header of {start_bytes - 8} bytes")
        header = parse_json_object(file.read(start_bytes - 8), f"{path} is damaged: its header")
    header.pop("__metadata__", None)
    return {
        name: _entry(path, name, fields, start_bytes, size_bytes) for name, fields in header.items()
    }


def _entry(
    path: Path, name: str, fields: object, start_bytes: int, size_bytes: int
) -> SafetensorsEntry:
    match fields:
        case {
            "dtype": str(dtype_name),
            "shape": [*shape],
            "data_offsets": [int(begin), int(end)],
        } if all(type(size) is int and size >= 0 for size in shape) and 0 <= begin <= end:
            pass
        case _:
            raise FormatError(f"{path} is damaged: tensor {name[:80]}: {shown(fields)}")
    item_bytes = _ITEM_BYTES.get(dtype_name)
    if item_bytes is not None and end - begin != math.prod(shape) * item_bytes:
        raise FormatError(
            f"{path} is damaged: tensor {name[:80]}: {end - begin} bytes for shape {shown(shape)}"
        )
    if start_bytes + end > size_bytes:
        raise FormatError(
            f"{path} is cut off: tensor {name[:80]} of shape {shown(shape)} ends at byte "
            f"{start_bytes + end}, the file at {size_bytes}"
        )
    return SafetensorsEntry(path, tuple(shape), dtype_name, start_bytes + begin)


def read_weight_map(index: Path) -> dict[str, str]:
    """Read the file name of each tensor; the files must be beside the index."""
    placed = read_json_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise FormatError(f"{index} is damaged: weight_map must be an object, got {shown(placed)}")
    for name, file in placed.items():
        is_name = isinstance(file, str) and Path(file).name == file and file.isprintable()
        if not is_name or len(file.encode()) > _MAX_NAME_BYTES:
            raise FormatError(f"{index} is damaged: weight_map: {name[:80]} is in {shown(file)}")
    return placed
