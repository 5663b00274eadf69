"""Reads weights from safetensors files, one or many with an index. Knows nothing of layers.

They are read without the library, whose memory map would count into peak memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from model.formats.quantization import Quantization
from model.formats.safetensors import SafetensorsEntry, read_safetensors_header, read_weight_map
from model.weights.checkpoints.coded_matrix import CodedMatrix
from model.weights.checkpoints.stored_matrix import StoredMatrix, gather_matrices
from model.weights.interface import QuantizedRows, WeightsError
from model.weights.stored_tensor import PLAIN_DTYPES, read_rows
from model.weights.weight_files import safetensors_files

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsWeights:
    """See `WeightSource`: a folder's safetensors. Raises `ValueError`, `OSError`."""

    def __init__(self, folder: Path, quantization: Quantization | None = None) -> None:
        self._folder = folder
        #: From the index: which file should have a tensor.
        self._placed: dict[str, str] = {}
        #: How files were read that can be read in two ways.
        self.notes: list[str] = []
        paths = self._paths()
        self.paths = tuple(paths)
        patterns = ("*.safetensors", "pytorch_model*.bin", "adapter_config.json")
        others = {path for pattern in patterns for path in folder.glob(pattern)}.difference(paths)
        self.notes += [f"{path.name} is not read" for path in sorted(others)]
        #: A quantized matrix has one entry, in place of its parts.
        self._entries: dict[str, SafetensorsEntry | StoredMatrix] = {}
        entries = self._read_headers(paths)
        if quantization is None:
            self._entries |= entries
        else:
            self._entries, notes = gather_matrices(entries, quantization)
            self.notes += [*quantization.notes, *notes]
        self.leave_out([name for name in self._entries if is_derived(name)])
        #: See `WeightSource`.
        self.own_bits = self._find_integers()

    def _find_integers(self) -> str:
        """Name the integers that most values have; note those in an order of their own."""
        values: Counter[str] = Counter()
        num_mixed = 0
        for entry in self._entries.values():
            name = entry.name_of_integers if isinstance(entry, StoredMatrix) else ""
            if isinstance(entry, StoredMatrix) and entry.has_mixed_groups():
                name, num_mixed = "", num_mixed + 1
            values[name] += math.prod(entry.shape)
        if num_mixed:
            self.notes.append(f"{num_mixed} matrices have sorted inputs (desc_act): widened")
        names = [name for name, _count in values.most_common() if name]
        has_most = 2 * sum(values[name] for name in names) >= values.total()
        return " and ".join(names) if has_most else ""

    def _read_headers(self, paths: Iterable[Path]) -> dict[str, SafetensorsEntry]:
        entries: dict[str, SafetensorsEntry] = {}
        for path in paths:
            found = read_safetensors_header(path)
            if twice := entries.keys() & found:
                name = min(twice)
                where = f"tensor {name} in {entries[name].path}"
                self.notes.append(f"{where} is also in {path}, which is taken")
            entries |= found
        return entries

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
        in_file = entry.codes_name if isinstance(entry, StoredMatrix) else name
        return f"tensor {in_file} in {where}"

    def blocks(self, name: str) -> Iterator[Tensor]:
        """See `WeightSource`."""
        entry = self._entries[name]
        if isinstance(entry, StoredMatrix):
            return entry.read().rows()
        if entry.dtype_name not in PLAIN_DTYPES:
            raise WeightsError(
                f"{self.describe(name)} is of type {entry.dtype_name}; "
                f"supported are {', '.join(PLAIN_DTYPES)}"
            )
        return read_rows(entry)

    def integers(self, name: str) -> Iterator[QuantizedRows] | None:
        """See `WeightSource`: all rows at a time."""
        coded = self.coded(name)
        rows = None if coded is None else coded.quantized()
        return None if rows is None else iter([rows])

    def coded(self, name: str) -> CodedMatrix | None:
        """Return a quantized matrix as its file has it; None: it is plain."""
        entry = self._entries[name]
        return entry.read() if isinstance(entry, StoredMatrix) else None


def is_derived(name: str) -> bool:
    """Return whether a tensor holds the frequencies of early Llama checkpoints."""
    return name.endswith("rotary_emb.inv_freq")
