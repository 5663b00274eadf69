"""`Ops` of model/ops.py, compiled: a call takes microseconds where torch takes tens.

`python -m model.cpu.ops --output model/cpu/_cpu_ops.so` builds ahead of time, for machines without
a compiler. Knows nothing of how the library is found or built (`model/cpu/library.py`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from model.cpu.library import DTYPE_CODES, CpuLibrary, build, strided, typed


class CpuOps:
    """See `Ops`. Inputs are float32, float16 or bfloat16 on the CPU; anything else is a KeyError.

    `residual` is float32 and contiguous; `weight` may have any of the three dtypes.
    """

    def __init__(self, library: CpuLibrary) -> None:
        self.name = f"compiled ({library.isa})"
        self._kernels = library.kernels
        self._norm = library.functions.octavo_norm
        self._rope = library.functions.octavo_rope
        self._silu_mul = library.functions.octavo_silu_mul

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
        """See `Ops`."""
        return self._normed(x, None, weight, eps, out_dtype)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype
    ) -> Tensor:
        """See `Ops`."""
        if residual.dtype != torch.float32 or not residual.is_contiguous():
            raise ValueError("residual must be float32 and contiguous")
        return self._normed(x, residual, weight, eps, out_dtype)

    def _normed(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype
    ) -> Tensor:
        if x.dim() != 2 or x.stride(1) != 1:
            x = x.contiguous()
        dim = x.shape[-1]
        out = torch.empty(x.shape, dtype=out_dtype)
        self._norm(
            self._kernels,
            x.numel() // dim,
            dim,
            *typed(x),
            x.stride(-2),
            None if residual is None else residual.data_ptr(),
            *typed(weight),
            eps,
            *typed(out),
        )
        return out

    def apply_rope(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        """See `Ops`."""
        tokens, num_heads, _ = q.shape
        self._rope(
            self._kernels,
            tokens,
            DTYPE_CODES[q.dtype],
            *strided(q),
            num_heads,
            *strided(k),
            k.shape[1],
            positions.data_ptr(),
            cos_sin.data_ptr(),
            cos_sin.shape[1],
        )

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """See `Ops`."""
        tokens, width = gate_up.shape
        out = torch.empty((tokens, width // 2), dtype=gate_up.dtype)
        self._silu_mul(
            self._kernels,
            tokens,
            width // 2,
            gate_up.data_ptr(),
            gate_up.stride(0),
            DTYPE_CODES[gate_up.dtype],
            out.data_ptr(),
        )
        return out


def main() -> int:
    """Build the library for later."""
    parser = argparse.ArgumentParser(prog="python -m model.cpu.ops", description=main.__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("_cpu_ops.so"))
    output: Path = parser.parse_args().output
    reason = build(output)
    sys.stderr.write(f"{reason}\n" if reason else f"built {output}\n")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
