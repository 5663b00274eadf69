"""Writes matrices in the formats of quantized checkpoints, code by code, from their descriptions.

Knows nothing of the reader. Each writer rounds a matrix, and returns the parts of the file and the
values that these stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: The outputs of an AWQ word, from its lowest bits on.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GROUP = 16


@dataclass(frozen=True)
class Written:
    """A matrix in a file."""

    #: By their names behind the module's.
    parts: dict[str, Tensor]
    #: float32 `[outputs, inputs]`.
    values: Tensor


@dataclass(frozen=True)
class Writer:
    """A format: its `quantization_config`, and how a matrix is written."""

    config: dict[str, Any]
    write: Callable[[Tensor], Written]


def pack(codes: Sequence[Sequence[int]], bits: int, order: Sequence[int] = ()) -> Tensor:
    """Return int32 `[rows, words]`: `order` has a word's columns from the lowest bits on."""
    each = 32 // bits
    order = order or range(each)
    rows = []
    for row in codes:
        padded = [*row, *[0] * (-len(row) % each)]
        words = []
        for first in range(0, len(padded), each):
            word = sum(padded[first + order[place]] << (bits * place) for place in range(each))
            words.append(word - 2**32 if word >= 2**31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


@dataclass(frozen=True)
class _Rounded:
    """Codes from 0 on `[outputs, inputs]`; scales and zero points `[outputs, groups]`."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_of_input: Tensor

    @property
    def values(self) -> Tensor:
        scales, zeros = (one[:, self.group_of_input] for one in (self.scales, self.zeros))
        return (self.codes - zeros) * scales.float()


def round_groups(
    weight: Tensor,
    bits: int,
    group: int,
    *,
    symmetric: bool,
    scale_dtype: torch.dtype = torch.float16,
    group_of_input: Tensor | None = None,
) -> _Rounded:
    """Round each output's groups of inputs to integers of so many bits."""
    outputs, inputs = weight.shape
    groups = torch.arange(inputs) // group if group_of_input is None else group_of_input
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    num_groups = int(groups.max()) + 1
    scales = torch.empty(outputs, num_groups, dtype=scale_dtype)
    zeros = torch.empty(outputs, num_groups, dtype=torch.int64)
    for index in range(num_groups):
        part = weight[:, groups == index]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            scales[:, index] = torch.maximum(high, -low) / (middle - 1)
            zeros[:, index] = middle
        else:
            scales[:, index] = (high - low) / top
            zeros[:, index] = (-low / scales[:, index].float()).round().clamp(0, top)
    wide = weight / scales[:, groups].float() + zeros[:, groups]
    return _Rounded(wide.round().clamp(0, top).long(), scales, zeros, groups)


def write_awq(weight: Tensor, group: int = GROUP) -> Written:
    found = round_groups(weight, 4, group, symmetric=False)
    parts = {
        "qweight": pack(found.codes.T.tolist(), 4, AWQ_ORDER),
        "qzeros": pack(found.zeros.T.tolist(), 4, AWQ_ORDER),
        "scales": found.scales.T.contiguous(),
    }
    return Written(parts, found.values)


def write_gptq(
    weight: Tensor, bits: int, *, symmetric: bool, version: int, sorts: bool, group: int = GROUP
) -> Written:
    """Write it; `sorts`: groups take inputs from everywhere, as with `desc_act`."""
    inputs = weight.shape[1]
    groups = torch.arange(inputs) // (inputs if group == -1 else group)
    if sorts:
        groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(3))]
    found = round_groups(weight, bits, 0, symmetric=symmetric, group_of_input=groups)
    zeros = pack(found.zeros.T.tolist(), bits)
    if version == 1:
        # Whole words are subtracted: a code of 0 borrows from the next.
        ones = sum(1 << place for place in range(0, 32, bits))
        words = [[(word - ones) % 2**32 for word in row] for row in zeros.tolist()]
        zeros = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    parts = {
        "qweight": pack(found.codes.tolist(), bits).T.contiguous(),
        "qzeros": zeros,
        "scales": found.scales.T.contiguous(),
        "g_idx": groups.int(),
    }
    return Written(parts, found.values)


def write_packed(
    weight: Tensor, bits: int, *, symmetric: bool, group: int = GROUP, sorts: bool = False
) -> Written:
    inputs = weight.shape[1]
    groups = torch.arange(inputs) // (inputs if group == -1 else group)
    if sorts:
        groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(3))]
    found = round_groups(
        weight, bits, 0, symmetric=symmetric, scale_dtype=torch.bfloat16, group_of_input=groups
    )
    # Signed codes and zero points, each plus the middle: the numbers that `found` has already.
    parts = {
        "weight_packed": pack(found.codes.tolist(), bits),
        "weight_scale": found.scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        parts["weight_zero_point"] = pack(found.zeros.T.tolist(), bits).T.contiguous()
    if sorts:
        parts["weight_g_idx"] = groups.int()
    return Written(parts, found.values)


def write_integers(weight: Tensor, *, symmetric: bool, per_tensor: bool = False) -> Written:
    """Write bytes, with a scale for each output or for all."""
    flat = weight.reshape(1, -1) if per_tensor else weight
    found = round_groups(flat, 8, flat.shape[1], symmetric=symmetric, scale_dtype=torch.bfloat16)
    parts = {
        "weight": (found.codes - 128).to(torch.int8).view(weight.shape),
        "weight_scale": found.scales.view(-1) if per_tensor else found.scales,
    }
    if not symmetric:
        zeros = (found.zeros - 128).to(torch.int8)
        parts["weight_zero_point"] = zeros.view(-1) if per_tensor else zeros
    return Written(parts, found.values.view(weight.shape))


def write_floats(
    weight: Tensor,
    block: tuple[int, int],
    *,
    scale: str = "weight_scale",
    scale_dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] | None = None,
) -> Written:
    """Write 8-bit floats, with a scale for each block, the last of which may be cut; 0: no cut."""
    outputs, inputs = weight.shape
    rows, columns = block[0] or outputs, block[1] or inputs
    grid = -(-outputs // rows), -(-inputs // columns)
    scales = torch.empty(grid, dtype=scale_dtype)
    codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    values = torch.empty_like(weight)
    for i in range(grid[0]):
        for j in range(grid[1]):
            here = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = weight[here].abs().max() / 448
            codes[here] = (weight[here] / scales[i, j].float()).to(torch.float8_e4m3fn)
            values[here] = codes[here].float() * scales[i, j].float()
    return Written(
        {"weight": codes, scale: scales if shape is None else scales.view(shape)}, values
    )


def compressed(fmt: str, **weights: Any) -> dict[str, Any]:
    """Return a config with one group of all products."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


_AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
_GROUPS = {"strategy": "group", "group_size": GROUP}
_FLOAT = {"num_bits": 8, "type": "float"}

WRITERS: dict[str, Writer] = {
    "awq": Writer({**_AWQ, "version": "gemm"}, write_awq),
    "gptq": Writer(_GPTQ, lambda w: write_gptq(w, 4, symmetric=True, version=1, sorts=False)),
    "gptq asymmetric": Writer(
        {**_GPTQ, "sym": False}, lambda w: write_gptq(w, 4, symmetric=False, version=1, sorts=False)
    ),
    "gptq v2 asymmetric": Writer(
        {**_GPTQ, "sym": False, "checkpoint_format": "gptq_v2"},
        lambda w: write_gptq(w, 4, symmetric=False, version=2, sorts=False),
    ),
    "gptq desc_act": Writer(
        {**_GPTQ, "desc_act": True},
        lambda w: write_gptq(w, 4, symmetric=True, version=1, sorts=True),
    ),
    "gptq 8 bits": Writer(
        {**_GPTQ, "bits": 8, "sym": False},
        lambda w: write_gptq(w, 8, symmetric=False, version=1, sorts=False),
    ),
    "gptq whole rows": Writer(
        {**_GPTQ, "group_size": -1},
        lambda w: write_gptq(w, 4, symmetric=True, version=1, sorts=False, group=-1),
    ),
    "packed": Writer(
        compressed("pack-quantized", num_bits=4, symmetric=True, **_GROUPS),
        lambda w: write_packed(w, 4, symmetric=True),
    ),
    "packed asymmetric": Writer(
        compressed("pack-quantized", num_bits=4, symmetric=False, **_GROUPS),
        lambda w: write_packed(w, 4, symmetric=False),
    ),
    "packed sorted": Writer(
        compressed("pack-quantized", num_bits=4, actorder="group", **_GROUPS),
        lambda w: write_packed(w, 4, symmetric=True, sorts=True),
    ),
    "packed 8 bits": Writer(
        compressed("pack-quantized", num_bits=8, symmetric=False, strategy="channel"),
        lambda w: write_packed(w, 8, symmetric=False, group=-1),
    ),
    "integers": Writer(
        compressed("int-quantized", num_bits=8, strategy="channel"),
        lambda w: write_integers(w, symmetric=True),
    ),
    "integers asymmetric": Writer(
        compressed("int-quantized", num_bits=8, symmetric=False, strategy="channel"),
        lambda w: write_integers(w, symmetric=False),
    ),
    "integers whole": Writer(
        compressed("int-quantized", num_bits=8, symmetric=False, strategy="tensor"),
        lambda w: write_integers(w, symmetric=False, per_tensor=True),
    ),
    "floats": Writer(
        compressed("float-quantized", **_FLOAT, strategy="channel"),
        lambda w: write_floats(w, (1, 0), scale_dtype=torch.bfloat16),
    ),
    "floats whole": Writer(
        compressed("naive-quantized", **_FLOAT, strategy="tensor"),
        lambda w: write_floats(w, (0, 0), shape=(1,)),
    ),
    "floats in blocks": Writer(
        compressed("float-quantized", **_FLOAT, strategy="block", block_structure=[32, 32]),
        lambda w: write_floats(w, (32, 32)),
    ),
    "fp8 in blocks": Writer(
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32]},
        lambda w: write_floats(w, (32, 32), scale="weight_scale_inv"),
    ),
    "fp8 powers of two": Writer(
        {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
        lambda w: write_floats(
            w, (32, 32), scale="weight_scale_inv", scale_dtype=torch.float8_e8m0fnu
        ),
    ),
    "fp8 whole": Writer(
        {"quant_method": "fp8", "activation_scheme": "static"},
        lambda w: write_floats(w, (0, 0), shape=()),
    ),
}
