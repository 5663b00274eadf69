"""Reads weights from safetensors files, one or many with an index.

The format is an 8-byte length, a JSON header and the bytes, so it is read here rather than
through the library, whose memory map would count into peak memory. Knows nothing of layers.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.formats import FormatError
from model.formats.json_file import parse_json_object, read_json_object, shown
from model.weights.interface import WeightsError, read_bytes, row_blocks
from model.weights.weight_files import safetensors_files

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
#: As the format's own library has it.
_MOST_HEADER_BYTES = 100_000_000
#: Of a file, on any disk.
_LONGEST_NAME_BYTES = 255
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    shape: tuple[int, ...]
    dtype_name: str
    offset_bytes: int


class SafetensorsWeights:
    """See `WeightSource`: a folder's safetensors. Raises `ValueError`, `OSError`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: dict[str, _Entry] = {}
        #: From the index: which file should have a tensor.
        self._placed: dict[str, str] = {}
        paths = self._paths()
        notes = list(_notes_on_files(folder, paths))
        for path in paths:
            found = _read_header(path)
            if twice := self._entries.keys() & found:
                name = min(twice)
                notes.append(f"{self.describe(name)} is also in {path}, which is taken")
            self._entries |= found
        #: How files were read that can be read in two ways.
        self.notes = tuple(notes)
        self.leave_out([name for name in self._entries if is_derived(name)])

    def _paths(self) -> list[Path]:
        """Return the files in the order in which `transformers` reads them."""
        whole, index = self._folder / _WHOLE, self._folder / _INDEX
        if whole.is_file():
            return [whole]
        if not index.is_file():
            return safetensors_files(self._folder)
        self._placed = _weight_map(index)
        paths = [self._folder / name for name in sorted(set(self._placed.values()))]
        if missing := [path for path in paths if not path.is_file()]:
            raise WeightsError(f"{missing[0]} is missing, but {_INDEX} lists it")
        return paths

    def rename(self, name: str, other: str) -> None:
        """Rename a tensor to a name that is not in use."""
        self._entries[other] = self._entries.pop(name)
        self.leave_out(())

    def leave_out(self, names: Iterable[str]) -> None:
        """Remove tensors from `shapes`."""
        for name in names:
            del self._entries[name]
        self._shapes = {name: entry.shape for name, entry in self._entries.items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `WeightSource`."""
        return self._shapes

    def describe(self, name: str) -> str:
        """See `WeightSource`."""
        entry = self._entries.get(name)
        where = entry.path if entry else self._folder / self._placed.get(name, "")
        return f"tensor {name} in {where}"

    def blocks(self, name: str) -> Iterator[Tensor]:
        """See `WeightSource`."""
        entry = self._entries[name]
        dtype = _DTYPES.get(entry.dtype_name)
        if dtype is None:
            raise WeightsError(
                f"{self.describe(name)} is of type {entry.dtype_name}; "
                f"supported are {', '.join(_DTYPES)}"
            )
        row_bytes = math.prod(entry.shape[1:]) * dtype.itemsize
        with entry.path.open("rb") as file:
            for start, count in row_blocks(entry.shape):
                offset_bytes = entry.offset_bytes + start * row_bytes
                raw = read_bytes(file, offset_bytes, count * row_bytes)
                yield raw.view(dtype).view(count, *entry.shape[1:])


def is_derived(name: str) -> bool:
    """Return whether a tensor holds the frequencies of early Llama checkpoints."""
    return name.endswith("rotary_emb.inv_freq")


def _notes_on_files(folder: Path, read: Sequence[Path]) -> Iterator[str]:
    """Describe the files of a folder that are not read, here and by `transformers`."""
    has_index = (folder / _INDEX).is_file()
    if read == [folder / _WHOLE]:
        if has_index:
            yield f"{_WHOLE} is read, and {_INDEX} is not"
    elif not has_index:
        yield f"there is neither {_WHOLE} nor {_INDEX}: all files of safetensors are read"
    patterns = ("*.safetensors", "pytorch_model*.bin", "adapter_config.json")
    others = {path for pattern in patterns for path in folder.glob(pattern)} - set(read)
    for path in sorted(others):
        yield f"{path.name} is not read"


def _weight_map(index: Path) -> dict[str, str]:
    """Read the file name of each tensor; the files must be beside the index."""
    placed = read_json_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise FormatError(f"{index} is damaged: weight_map must be an object, got {shown(placed)}")
    for name, file in placed.items():
        is_name = isinstance(file, str) and Path(file).name == file and file.isprintable()
        if not is_name or len(file.encode()) > _LONGEST_NAME_BYTES:
            raise FormatError(f"{index} is damaged: weight_map: {name[:80]} is in {shown(file)}")
    return placed


def _read_header(path: Path) -> dict[str, _Entry]:
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        start_bytes = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start_bytes <= size_bytes:
            raise FormatError(f"{path} is cut off, or no safetensors file")
        if start_bytes - 8 > _MOST_HEADER_BYTES:
            raise FormatError(f"{path} is damaged: a header of {start_bytes - 8} bytes")
        header = parse_json_object(file.read(start_bytes - 8), f"{path} is damaged: its header")
    header.pop("__metadata__", None)
    return {
        name: _entry(path, name, fields, start_bytes, size_bytes) for name, fields in header.items()
    }


def _entry(path: Path, name: str, fields: object, start_bytes: int, size_bytes: int) -> _Entry:
    match fields:
        case {"dtype": str(dtype_name), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise FormatError(f"{path} is damaged: tensor {name[:80]}: {shown(fields)}")
    if not (all(type(size) is int and size >= 0 for size in shape) and 0 <= begin <= end):
        raise FormatError(f"{path} is damaged: tensor {name[:80]}: {shown(fields)}")
    dtype = _DTYPES.get(dtype_name)
    if dtype is not None and end - begin != math.prod(shape) * dtype.itemsize:
        raise FormatError(
            f"{path} is damaged: tensor {name[:80]}: {end - begin} bytes for shape {shown(shape)}"
        )
    if start_bytes + end > size_bytes:
        raise FormatError(
            f"{path} is cut off: tensor {name[:80]} of shape {shown(shape)} ends at byte "
            f"{start_bytes + end}, the file at {size_bytes}"
        )
    return _Entry(path, tuple(shape), dtype_name, start_bytes + begin)
