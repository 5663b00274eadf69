"""Reads weights from safetensors files, one or many with an index. Knows nothing of layers.

They are read without the library, whose memory map would count into peak memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from model.formats.safetensors import SafetensorsEntry, read_safetensors_header, read_weight_map
from model.weights.interface import QuantizedRows, WeightsError, read_bytes, row_blocks
from model.weights.weight_files import safetensors_files

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsWeights:
    """See `WeightSource`: a folder's safetensors. Raises `ValueError`, `OSError`."""

    own_bits = ""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: dict[str, SafetensorsEntry] = {}
        #: From the index: which file should have a tensor.
        self._placed: dict[str, str] = {}
        #: How files were read that can be read in two ways.
        self.notes: list[str] = []
        paths = self._paths()
        patterns = ("*.safetensors", "pytorch_model*.bin", "adapter_config.json")
        others = {path for pattern in patterns for path in folder.glob(pattern)}.difference(paths)
        self.notes += [f"{path.name} is not read" for path in sorted(others)]
        for path in paths:
            found = read_safetensors_header(path)
            if twice := self._entries.keys() & found:
                name = min(twice)
                self.notes.append(f"{self.describe(name)} is also in {path}, which is taken")
            self._entries |= found
        self.leave_out([name for name in self._entries if is_derived(name)])

    def _paths(self) -> list[Path]:
        """Return the files in the order in which `transformers` reads them."""
        whole, index = self._folder / _WHOLE, self._folder / _INDEX
        if whole.is_file():
            if index.is_file():
                self.notes.append(f"{_WHOLE} is read, and {_INDEX} is not")
            return [whole]
        if not index.is_file():
            note = f"there is neither {_WHOLE} nor {_INDEX}: all files of safetensors are read"
            self.notes.append(note)
            return safetensors_files(self._folder)
        self._placed = read_weight_map(index)
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
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

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

    def quantized(self, name: str) -> QuantizedRows | None:  # noqa: ARG002 - the interface's
        """See `WeightSource`."""
        return None


def is_derived(name: str) -> bool:
    """Return whether a tensor holds the frequencies of early Llama checkpoints."""
    return name.endswith("rotary_emb.inv_freq")
