"""Decodes a GGUF model's weights.

Values are decoded by the `gguf` package, in large pieces (its own entry point cuts them into 16
rows, which takes five times as long), integers by `model/weights/ggml_blocks.py`. Knows nothing of
layers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import gguf
import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from model.architectures.arch import ArchSpec
from model.architectures.registry import declare_tensors
from model.weights.ggml_blocks import BLOCK_TYPES, BlockType
from model.weights.gguf_file import GgufFile, GgufTensor
from model.weights.interface import (
    BLOCK_VALUES,
    PACKED_ROWS,
    QuantizedRows,
    WeightsError,
    read_bytes,
    row_blocks,
)

#: Divisors of rope's frequencies, which only some files have: our name, and that in the file.
ROPE_FACTORS, _FACTORS = "rope_factors", "rope_freqs.weight"

#: Integers are unpacked in larger blocks: the values of a block take a byte each.
_UNPACKED_VALUES = 2**18

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class GgufWeights:
    """See `WeightSource`: a GGUF file's tensors."""

    def __init__(self, file: GgufFile, arch: ArchSpec) -> None:
        self._path = file.path
        self.paths = tuple(sorted({file.path, *(one.path for one in file.tensors.values())}))
        declared = declare_tensors(arch)
        #: By the name in the file; that of safetensors if it is declared, else the same.
        names = {one.gguf_name: name for name, one in declared.items()} | {_FACTORS: ROPE_FACTORS}
        self._tensors = {names.get(name, name): one for name, one in file.tensors.items()}
        self._gguf_names = {name: theirs for theirs, name in names.items()}
        self.shapes = {name: one.shape for name, one in self._tensors.items()}
        self._interleaved = {name for name, one in declared.items() if one.is_interleaved}
        self._head_dim = arch.head_dim
        self.own_bits = _own_bits(file)

    def describe(self, name: str) -> str:
        """See `WeightSource`."""
        found = self._tensors.get(name)
        shown = f"{found.name} ({found.type_name})" if found else self._gguf_names[name]
        return f"tensor {shown} in {found.path if found else self._path}"

    def blocks(self, name: str) -> Iterator[Tensor]:
        """See `WeightSource`."""
        tensor = self._tensors[name]
        for raw in self._raw_rows(name, BLOCK_VALUES):
            rows = self._decode(name, tensor, raw).view(len(raw), *tensor.shape[1:])
            yield self._in_order(name, rows)

    def integers(self, name: str) -> Iterator[QuantizedRows] | None:
        """See `WeightSource`."""
        tensor = self._tensors[name]
        kind = BLOCK_TYPES.get(tensor.type_name)
        if kind is None or len(tensor.shape) != 2:
            return None
        return self._unpacked_rows(name, kind)

    def _unpacked_rows(self, name: str, kind: BlockType) -> Iterator[QuantizedRows]:
        for raw in self._raw_rows(name, _UNPACKED_VALUES):
            codes, scales, minimums = (
                None if part is None else self._in_order(name, part.reshape(len(raw), -1))
                for part in kind.unpack(raw.view(-1, kind.block_bytes))
            )
            assert codes is not None, "blocks have codes"
            assert scales is not None, "blocks have scales"
            yield QuantizedRows(codes, scales, minimums, kind.bits)

    def _raw_rows(self, name: str, block_values: int) -> Iterator[Tensor]:
        """Yield the bytes of consecutive rows, `[rows, bytes of a row]`."""
        tensor = self._tensors[name]
        row_bytes = tensor.num_bytes // tensor.shape[0]
        multiple = self._head_dim if name in self._interleaved else PACKED_ROWS
        with tensor.path.open("rb") as file:
            for start, count in row_blocks(tensor.shape, multiple, block_values):
                offset_bytes = tensor.offset_bytes + start * row_bytes
                raw = read_bytes(file, offset_bytes, count * row_bytes)
                yield raw.view(count, row_bytes)

    def _in_order(self, name: str, rows: Tensor) -> Tensor:
        """Undo the converter's reordering of rows, where there is any."""
        if name not in self._interleaved:
            return rows
        return _halves_from_neighbours(rows, self._head_dim)

    def _decode(self, name: str, tensor: GgufTensor, raw: Tensor) -> Tensor:
        if plain := _PLAIN.get(tensor.type_name):
            return raw.flatten().view(plain)
        kind = GGMLQuantizationType[tensor.type_name]
        try:
            return torch.from_numpy(gguf.dequantize(raw.numpy().reshape(1, -1), kind))
        except NotImplementedError as error:
            raise WeightsError(f"{self.describe(name)}: this type is not supported") from error


def _halves_from_neighbours(rows: Tensor, head_dim: int) -> Tensor:
    """Undo the converter's reordering: within a head, (i, half) becomes (half, i)."""
    rest = rows.shape[1:]
    return rows.view(-1, head_dim // 2, 2, *rest).transpose(1, 2).reshape(-1, *rest)


def _own_bits(file: GgufFile) -> str:
    """Name the types of integers, the most frequent first, if they have most of the values."""
    values: Counter[str] = Counter()
    for tensor in file.tensors.values():
        values[tensor.type_name] += math.prod(tensor.shape)
    names = [name for name, _count in values.most_common() if name in BLOCK_TYPES]
    if 2 * sum(values[name] for name in names) < values.total():
        return ""
    return " and ".join(names)
