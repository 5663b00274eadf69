"""Matrix products with packed weights, in several formats.

A linear layer is packed once, in the layout of this CPU's fastest kernel, and the plain copy is
dropped. Knows nothing of layers or of files.

Every packed format but int8 rounds the weights alone (bf16 the input activations too). In the
packed formats a row's result does not depend on the other rows, to the last bit, so a batch does
not change a request's tokens. Float32 differs in its last bits at some sizes.
"""

from __future__ import annotations

import threading
import warnings
from typing import Literal, Protocol, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional

Format: TypeAlias = Literal["none", "fp16", "bf16", "int8", "int4", "own"]

_ONEDNN = torch.ops.mkldnn
_FBGEMM = torch.ops.quantized


class Linear(Protocol):
    """A packed matrix product: `[rows, in]` of `in_dtype` to `[rows, out]` of `out_dtype`."""

    in_dtype: torch.dtype
    out_dtype: torch.dtype
    #: Memory the packed weights and the bias take.
    weight_bytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply contiguous rows; the result is a new tensor."""


class PlainLinear:
    """Unpacked weights in the activations' dtype, on any device; may share them with others."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.in_dtype = self.out_dtype = weight.dtype
        self.weight_bytes = _num_bytes(weight, bias)
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        return functional.linear(x, self._weight, self._bias)


class OneDnnLinear:
    """oneDNN's blocked layout, float32 or bfloat16 (in and out).

    Up to twice as fast as the plain product in float32 for 8 rows and more; in bfloat16 worth it
    only where the CPU has instructions for it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.in_dtype = self.out_dtype = weight.dtype
        self.weight_bytes = _num_bytes(weight, bias)
        # The layout is chosen for a number of rows. These two keep rows independent of each
        # other: with 8 rows bfloat16 does not, with 1 float32 does not.
        num_rows = 1 if weight.dtype == torch.bfloat16 else 8
        self._weight = _ONEDNN._reorder_linear_weight(weight, num_rows)  # noqa: SLF001 - no public name
        self._bias = bias
        self._multiply = _ONEDNN._linear_pointwise.default  # noqa: SLF001 - no public name

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        return cast("Tensor", self._multiply(x, self._weight, self._bias, "none", [], ""))


class Fp16Linear:
    """FBGEMM's packed float16 weights with float32 arithmetic: half the memory traffic."""

    in_dtype = out_dtype = torch.float32

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        num_rows, num_columns = weight.shape
        # FBGEMM pads to whole tiles of 512 by 16: a width of 576 takes as much as 1024.
        padded = _round_up(num_columns, 512) * _round_up(num_rows, 16)
        self.weight_bytes = padded * 2 + _num_bytes(bias)
        self._packed = _FBGEMM.linear_prepack_fp16(weight, bias)
        self._multiply = _FBGEMM.linear_dynamic_fp16.default

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        return cast("Tensor", self._multiply(x, self._packed))


class Int8Linear:
    """Eight-bit weights, a scale per output; eight-bit activations, a scale per row.

    torch's own `linear_dynamic` takes one scale for all rows, so one request's outliers would
    round another's values. Here every row is scaled to [-1, 1] first, so rows are independent.
    This costs a third more time at 32 rows.
    """

    in_dtype = out_dtype = torch.float32
    #: Warning filters belong to the process, and layers are packed by several threads.
    _warnings_lock = threading.Lock()

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        num_rows = weight.shape[0]
        self.weight_bytes = weight.numel() + num_rows * 12 + _num_bytes(bias)
        low, high = weight.aminmax(dim=1)
        scales = torch.maximum(high, low.neg_()).div_(127).clamp_min_(1e-30)
        rounded = weight.div_(scales.unsqueeze(1)).round_().to(torch.int8)
        with self._warnings_lock, warnings.catch_warnings():
            # Quantised tensors leave torch one day; FBGEMM takes its weights in no other form.
            warnings.filterwarnings("ignore", message=r"torch\.quantize_per_tensor", module="model")
            quantized = torch._make_per_channel_quantized_tensor(  # noqa: SLF001 - the only maker from integers
                rounded, scales.double(), torch.zeros(num_rows, dtype=torch.int64), 0
            )
        self._packed = _FBGEMM.linear_prepack(quantized, None)
        self._bias = bias
        self._multiply = _FBGEMM.linear_with_input_q_dq_qweight_dq_output_fp32.default
        # Without VNNI pairs of products are added in 16 bits, and only 7 bits do not overflow.
        self._levels = 127 if torch.cpu.get_capabilities().get("avx512_vnni") else 63

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        reach = x.abs().amax(dim=1, keepdim=True).clamp_min_(1e-30)
        levels = self._levels
        result = self._multiply(x / reach, 1.0 / levels, levels + 1, self._packed).mul_(reach)
        return cast("Tensor", result if self._bias is None else result.add_(self._bias))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _num_bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def pack(weight: Tensor, bias: Tensor | None, fmt: Format) -> Linear:
    """Pack `[out, in]` weights, given in `staging_dtype`. The weight is used up: do not read it."""
    if fmt == "fp16":
        return Fp16Linear(weight, bias)
    if fmt == "int8":
        return Int8Linear(weight, bias)
    if weight.device.type == "cpu" and _has_onednn():
        return OneDnnLinear(weight, bias)
    return PlainLinear(weight, bias)


def staging_dtype(fmt: Format, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which `pack` takes weights and bias; `dtype` is the activations'."""
    if fmt == "none":
        return dtype
    return torch.bfloat16 if fmt == "bf16" else torch.float32


def head_format(fmt: Format) -> Format:
    """Format of the product that gives the logits: in bfloat16 the best of them would often tie."""
    return "fp16" if fmt == "bf16" else fmt


def why_not_packed(fmt: Format) -> str:
    """Return why `pack` cannot pack a format on this CPU; empty if it can."""
    if fmt in {"int4", "own"}:
        return "it needs the compiled CPU operations"
    if fmt == "bf16":
        # ATEN_CPU_CAPABILITY=avx2 makes this CPU stand in for a lesser one.
        if torch.backends.cpu.get_cpu_capability() != "AVX512":
            return "bf16 needs a CPU with AVX-512"
        if not (_has("amx_bf16") or _has("avx512_bf16")):
            return "the CPU has neither AMX nor AVX512-BF16"
        if not _has_onednn():
            return "this torch has no oneDNN"
    if fmt in {"fp16", "int8"} and "fbgemm" not in torch.backends.quantized.supported_engines:
        return "FBGEMM needs an x86 CPU with AVX2"
    return ""


def _has(feature: str) -> bool:
    return bool(torch.cpu.get_capabilities().get(feature))


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call] # torch's
