"""Decodes a GGUF model's weights.

Blocks are decoded by the `gguf` package, in large pieces (its own entry point cuts them into 16
rows, which takes five times as long). Knows nothing of layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from model.architectures.arch import ArchSpec
from model.architectures.registry import declare_tensors
from model.weights.gguf_file import GgufFile, GgufTensor
from model.weights.interface import WeightsError, read_bytes, row_blocks

#: Divisors of rope's frequencies, which only some files have: our name, and that in the file.
ROPE_FACTORS, _FACTORS = "rope_factors", "rope_freqs.weight"

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class GgufWeights:
    """See `WeightSource`: a GGUF file's tensors."""

    def __init__(self, file: GgufFile, arch: ArchSpec) -> None:
        self._path = file.path
        declared = declare_tensors(arch)
        #: By the name in the file; that of safetensors if it is declared, else the same.
        names = {one.gguf_name: name for name, one in declared.items()} | {_FACTORS: ROPE_FACTORS}
        self._tensors = {names.get(name, name): one for name, one in file.tensors.items()}
        self._gguf_names = {name: theirs for theirs, name in names.items()}
        self.shapes = {name: one.shape for name, one in self._tensors.items()}
        self._interleaved = {name for name, one in declared.items() if one.is_interleaved}
        self._head_dim = arch.head_dim

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
