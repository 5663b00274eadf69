"""Reads a tensor of a safetensors file, in whole or by rows. Knows nothing of its meaning."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from model.formats.safetensors import SafetensorsEntry
from model.weights.interface import PACKED_ROWS, read_bytes, row_blocks

#: By their names in the file: plain values, then codes, scales and indices of quantized ones.
PLAIN_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_DTYPES = {
    **PLAIN_DTYPES,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}

#: Rows are read in blocks of about so many values, which stay in a cache until they are packed.
_READ_VALUES = 2**17


def read_tensor(entry: SafetensorsEntry) -> Tensor:
    """Read all of a tensor. Raises `WeightsError` where its file ends before."""
    dtype = _DTYPES[entry.dtype_name]
    with entry.path.open("rb") as file:
        raw = read_bytes(file, entry.offset_bytes, math.prod(entry.shape) * dtype.itemsize)
    return raw.view(dtype).view(entry.shape)


def read_rows(entry: SafetensorsEntry) -> Iterator[Tensor]:
    """Yield consecutive rows of a tensor. Raises `WeightsError` likewise."""
    dtype = _DTYPES[entry.dtype_name]
    row_bytes = math.prod(entry.shape[1:]) * dtype.itemsize
    with entry.path.open("rb") as file:
        for start, count in row_blocks(entry.shape, PACKED_ROWS, _READ_VALUES):
            offset_bytes = entry.offset_bytes + start * row_bytes
            raw = read_bytes(file, offset_bytes, count * row_bytes)
            yield raw.view(dtype).view(count, *entry.shape[1:])
