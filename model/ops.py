"""The small operations between matrix products, as an interface with a plain torch version.

`model/cpu/ops.py` has the compiled one. Nothing here knows of pages or of weights' formats.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class Ops(Protocol):
    """Elementwise and row-wise operations; `out_dtype` is the next matrix product's input."""

    #: For the operator.
    name: str

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
        """Apply the root-mean-square norm to the last dimension (arXiv:1910.07467), in float32."""

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype
    ) -> Tensor:
        """Add x to `residual` in place, then return the norm of the sum."""

    def apply_rope(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        """Rotate q `[tokens, heads, head_dim]` and k in place (arXiv:2104.09864, halves layout).

        `cos_sin` is float32 `[max_positions, rotary_dim]`: cosines, then sines, of each position.
        Dimensions past `rotary_dim` stay as they are.
        """

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """Return silu(first half) * second half over the last dimension, in the input's dtype."""


class TorchOps:
    """The plain version, on any device: the oracle of the others."""

    name = "torch"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
        """See `Ops`."""
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (wide * scale * weight).to(out_dtype)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype
    ) -> Tensor:
        """See `Ops`."""
        residual.add_(x)
        return self.rms_norm(residual, weight, eps, out_dtype)

    def apply_rope(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        """See `Ops`."""
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
        half = cos.shape[-1]
        for x in (q, k):
            first, second = x[..., :half].float(), x[..., half : 2 * half].float()
            # Both before either is stored: float() of float32 is the tensor itself.
            rotated = first * cos - second * sin, second * cos + first * sin
            x[..., :half], x[..., half : 2 * half] = rotated

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """See `Ops`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up
