"""`Ops` in Triton, and rotation fused with storing keys and values in their pages.

Tests run the kernels in Triton's interpreter (`tests/model/test_ops.py`) and compile them for sm_80
and sm_90; docs/performance.md has the status on GPUs. Knows nothing of weights or of attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.extras import why_missing

#: Heads one program rotates.
_HEADS_EACH = 8
#: Gates one program takes.
_GATES = 1024


class SinkQueries(NamedTuple):
    """A second rotation of some queries: see `RowViews`."""

    #: `[tokens, heads, head_dim]`, contiguous: the results. Others are not written.
    q: Tensor
    #: int64 `[tokens]`, rows of `cos_sin`; negative where there is no second rotation.
    positions: Tensor
    cos_sin: Tensor


class GpuOps:
    """See `Ops`. Every result is contiguous."""

    name = "Triton"

    def __init__(self) -> None:
        # Not at the top of the file: a machine without triton can still load it.
        from model.cuda import kernels as gpu_kernels  # noqa: PLC0415 - see above

        self._kernels = gpu_kernels

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
        """See `Ops`; x has two or three dimensions, the last one contiguous."""
        assert x.dim() in {2, 3}, f"rows of {tuple(x.shape)}"
        num_inner = x.shape[1] if x.dim() == 3 else 1
        inner_stride = x.stride(1) if x.dim() == 3 else 0
        return self._norm(x, None, weight, eps, out_dtype, (num_inner, inner_stride))

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype
    ) -> Tensor:
        """See `Ops`; both are `[rows, width]`, the residual contiguous float32."""
        if residual.dtype != torch.float32:
            raise ValueError(f"residual must be float32, got {residual.dtype}")
        return self._norm(x, residual, weight, eps, out_dtype, (1, 0))

    def _norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        out_dtype: torch.dtype,
        inner: tuple[int, int],
    ) -> Tensor:
        num_inner, inner_stride = inner
        width = x.shape[-1]
        block = power_of_two(width)
        out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
        self._kernels.rms_norm_kernel[(x.numel() // width,)](
            x,
            out if residual is None else residual,
            weight,
            out,
            eps,
            x.stride(0),
            inner_stride,
            NUM_INNER=num_inner,
            WIDTH=width,
            BLOCK=block,
            ADDS=residual is not None,
            num_warps=min(max(block // 512, 1), 16),
        )
        return out

    def apply_rope(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        """See `Ops`."""
        self.rope_and_store(q, k, k, positions, cos_sin, None)

    def rope_and_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        pages: tuple[Tensor, Tensor, Tensor] | None,
        sinks: SinkQueries | None = None,
    ) -> None:
        """Rotate q in place; store k, rotated, and v in their pages, without changing either.

        `pages` are a layer's keys, its values (`[pages, page_size, kv_heads, head_dim]`) and each
        token's slot in them. None: rotate k in place, too, and do not use v.
        `sinks`: rotate some queries a second time, too.
        """
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads, half = k.shape[1], cos_sin.shape[1] // 2
        # Without pages the kernel does not use these: any tensors serve as placeholders.
        keys, values, slots = (k, k, positions) if pages is None else pages
        sink_q, sink_at, sink_cos_sin = sinks or (q, positions, cos_sin)
        num_blocks = -(-num_heads // _HEADS_EACH) + -(-num_kv_heads // _HEADS_EACH)
        self._kernels.rope_kernel[(num_tokens, num_blocks)](
            q,
            k,
            v,
            positions,
            cos_sin,
            sink_q,
            sink_at,
            sink_cos_sin,
            slots,
            keys,
            values,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            keys.stride(1),
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            DIM_BLOCK=power_of_two(head_dim),
            HALF=half,
            HALF_BLOCK=power_of_two(half),
            HEADS_EACH=_HEADS_EACH,
            STORES=pages is not None,
            HAS_SINKS=sinks is not None,
            num_warps=2,
        )

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """See `Ops`; `gate_up` is contiguous `[rows, 2 * width]`."""
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
        block = min(power_of_two(width), _GATES)
        self._kernels.silu_and_mul_kernel[(rows, -(-width // block))](
            gate_up, out, WIDTH=width, BLOCK=block, num_warps=4
        )
        return out


def why_not() -> str:
    """Return why a CUDA machine cannot run these; empty where it can."""
    return why_missing("triton", "cuda")


def why_not_ampere(device: torch.device) -> str:
    """Return why the device is not an Ampere GPU or a later one; empty if it is."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"compute capability must be 8.0 or more, got {major}.{minor}"


def power_of_two(value: int) -> int:
    """Return the smallest power of two that is not below the value."""
    return 1 << (value - 1).bit_length()
