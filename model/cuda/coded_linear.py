"""Products on CUDA with the codes of a quantized checkpoint: 4 or 8 bits of memory a weight.

Tests run the kernel in Triton's interpreter and compile it for sm_80 and sm_90;
docs/performance.md has the status on GPUs. Knows nothing of files or of layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from model.weights.checkpoints.coded_matrix import CodedMatrix

Kind: TypeAlias = Literal["nibbles", "bytes", "floats"]

#: Inputs that one pass of a program's loop takes. Of two nibbles each half must be 16 or more, the
#: least that matrix instructions take.
_MOST_BLOCK, _LEAST_BLOCK = 128, {"nibbles": 32, "bytes": 16, "floats": 16}
#: Rows of a program at most, and its outputs: few where few rows leave multiprocessors idle.
_MOST_ROWS, _FEW_ROWS = 64, 16
_OUTPUTS, _FEW_ROWS_OUTPUTS = 64, 32


class CodedLinear:
    """See `Linear`; made by `pack_codes`."""

    def __init__(
        self, parts: Sequence[CodedMatrix], bias: Tensor | None, dtype: torch.dtype, block: int
    ) -> None:
        # Not at the top of the file: a machine without triton can still load it.
        from model.cuda import coded_kernels  # noqa: PLC0415 - see above

        self.in_dtype = self.out_dtype = dtype
        self._kernel = coded_kernels.coded_product_kernel
        self._kind, self._block = _kind(parts[0]), block
        self._group_inputs = parts[0].block[1]
        self._num_inputs = parts[0].codes.shape[1]
        self._codes = _packed(torch.cat([_octets(one) for one in parts]), self._kind, block)
        self._scales = _table([one.scales[_blocks(one)] for one in parts])
        zeros = None if self._kind == "floats" else [_zeros(one) for one in parts]
        is_middle = zeros is None or all(bool((one == _middle(parts[0])).all()) for one in zeros)
        self._zeros = None if zeros is None or is_middle else _table(zeros).to(torch.uint8)
        self._bias = bias
        tables = (self._codes, self._scales, self._zeros, bias)
        self.weight_bytes = sum(one.nbytes for one in tables if one is not None)

    def to(self, device: torch.device) -> CodedLinear:
        """Move the weights, and return this product."""
        self._codes, self._scales = self._codes.to(device), self._scales.to(device)
        self._zeros = None if self._zeros is None else self._zeros.to(device)
        self._bias = None if self._bias is None else self._bias.to(device)
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        num_rows, num_outputs = x.shape[0], self._codes.shape[1]
        out = torch.empty(num_rows, num_outputs, dtype=self.out_dtype, device=x.device)
        is_few = num_rows <= _FEW_ROWS
        rows = _FEW_ROWS if is_few else _MOST_ROWS
        outputs = _FEW_ROWS_OUTPUTS if is_few else _OUTPUTS
        # Tables that are not there are not read: any tensor serves as a placeholder.
        self._kernel[(-(-num_rows // rows), -(-num_outputs // outputs))](
            x,
            self._codes,
            self._scales,
            self._codes if self._zeros is None else self._zeros,
            self._scales if self._bias is None else self._bias,
            out,
            num_rows,
            NUM_INPUTS=self._num_inputs,
            NUM_OUTPUTS=num_outputs,
            GROUP_INPUTS=self._group_inputs,
            KIND=self._kind,
            HAS_ZEROS=self._zeros is not None,
            HAS_BIAS=self._bias is not None,
            ROWS=rows,
            OUTPUTS=outputs,
            BLOCK=self._block,
            num_warps=4,
        )
        return out


def pack_codes(
    parts: Sequence[CodedMatrix], bias: Tensor | None, dtype: torch.dtype, device: torch.device
) -> CodedLinear | None:
    """Pack matrices that share their input, one below the other.

    None where the kernel cannot take them: sorted inputs, small or different groups.
    """
    first = parts[0]
    alike = {(_kind(one), one.block[1], one.codes.shape[1]) for one in parts}
    is_sorted = any(one.group_of_input is not None for one in parts)
    block = math.gcd(first.codes.shape[1], first.block[1], _MOST_BLOCK)
    if is_sorted or len(alike) > 1 or block < _LEAST_BLOCK[_kind(first)]:
        return None
    return CodedLinear(parts, bias, dtype, block).to(device)


def _kind(matrix: CodedMatrix) -> Kind:
    if matrix.codes.is_floating_point():
        return "floats"
    return "nibbles" if matrix.bits == 4 else "bytes"


def _middle(matrix: CodedMatrix) -> int:
    return 1 << (matrix.bits - 1)


def _octets(matrix: CodedMatrix) -> Tensor:
    """Return uint8 codes: integers from 0 on, or the bits of floats."""
    if matrix.codes.dtype == torch.int8:
        # Bytes wrap: -8 is 248, and 8 more is 0.
        return matrix.codes.view(torch.uint8) + _middle(matrix)
    return matrix.codes.view(torch.uint8)


def _zeros(matrix: CodedMatrix) -> Tensor:
    """Return the zero points `[outputs, groups]` of codes from 0 on."""
    zeros = torch.zeros_like(matrix.scales) if matrix.zeros is None else matrix.zeros
    if matrix.codes.dtype == torch.int8:
        zeros = zeros + _middle(matrix)
    return zeros[_blocks(matrix)]


def _blocks(matrix: CodedMatrix) -> Tensor:
    """Return the block of each output."""
    return torch.arange(matrix.codes.shape[0]) // matrix.block[0]


def _packed(octets: Tensor, kind: Kind, block: int) -> Tensor:
    """Return the codes as the kernel reads them, `[inputs, outputs]` or half as many inputs."""
    if kind != "nibbles":
        return octets.T.contiguous()
    low, high = octets.view(len(octets), -1, 2, block // 2).unbind(2)
    return (low | (high << 4)).flatten(1).T.contiguous()


def _table(parts: Sequence[Tensor]) -> Tensor:
    """Return `[groups, outputs]` of parts `[outputs, groups]`."""
    return torch.cat(list(parts)).T.contiguous()
