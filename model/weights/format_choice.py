"""Chooses the format of the weights: as asked, or the fastest near-lossless one by measurement.

A measurement is kept per CPU, versions and shape, so only the first start pays for it. Knows
nothing of files of weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import cast, get_args

import torch
from torch import Tensor

from model.cpu.instruction_sets import cpu_model
from model.cpu.library import CpuLibrary
from model.kv.arena import Arena
from model.weights.interface import QuantizedRows
from model.weights.linear import Format, Linear, pack, staging_dtype, why_not_packed
from model.weights.source import octavo_home
from model.weights.tiled_linear import (
    INTEGER_FORMATS,
    TILED_FORMATS,
    ActivationBits,
    TiledLinear,
)
from model.weights.tiles import pack_floats, pack_integers

#: A step of one stream, of some, of many, and a chunk of a prompt.
TIMED_ROWS = (1, 8, 32, 256)
#: Best first where nothing can be timed. Eight bits are not near-lossless.
_CANDIDATES: tuple[Format, ...] = ("bf16", "fp16")
#: More than the caches hold, as in a model.
_TIMED_WEIGHTS = 2**24
_BUDGET_S = 0.25
#: A file's own integers are smaller and exact: they are taken if they are not this much slower.
_OWN_ADVANTAGE = 1.25
#: The integers of a file, as they are timed: few bits (of 4 to 6), or many.
_FEW_BITS, _MANY_BITS, _GROUP_INPUTS = 4, 8, 32


def choose_format(
    quantization: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    library: CpuLibrary | None = None,
    num_inputs: int = 2048,
    own_bits: str = "",
) -> tuple[Format, str]:
    """Choose the format of the linear layers; return it with the reason, for the operator.

    `library`: its products multiply bf16 and integers, on any CPU; `num_inputs`: those of most
    products; `own_bits`: see `WeightSource`. Raises `ValueError` if the device or the CPU lacks the
    format.
    """
    if quantization not in {"auto", *get_args(Format)}:
        allowed = ", ".join(("auto", *get_args(Format)))
        raise ValueError(f"quantization must be one of {allowed}: {quantization!r}")
    if device.type != "cpu":
        if quantization not in {"auto", "none"}:
            raise ValueError(f"quantization {quantization} is for CPUs; on {device.type} use none")
        return "none", f"weights in {_name(dtype)}"
    if dtype != torch.float32:
        raise ValueError(
            f"dtype on a CPU is float32, got {_name(dtype)}; quantization fp16 or bf16 halves the "
            "weights"
        )
    if quantization == "own" and not own_bits:
        raise ValueError("quantization own is for files of integers; this one has none")
    if quantization == "auto":
        return _fastest_format(library, num_inputs, own_bits)
    fmt = cast("Format", quantization)
    if reason := _why_not(fmt, library):
        raise ValueError(f"quantization {fmt} does not run here: {reason}")
    return fmt, f"quantization {fmt} as asked"


def choose_activation_bits(
    activation_bits: str, fmt: Format, library: CpuLibrary | None
) -> tuple[ActivationBits, str]:
    """Choose the bits of the activations that meet integer weights; return them with a note.

    int8 and int4 trade quality for speed, so `auto` is 8 with them where that is faster. Raises
    `ValueError` if 8 is requested and has no effect here.
    """
    has_integers = fmt in INTEGER_FORMATS
    is_faster = library is not None and library.gains_by_byte_rows
    if activation_bits == "8" and not has_integers:
        raise ValueError(f"activation_bits 8 is for weights in int8, int4 or own, not in {fmt}")
    if activation_bits == "8" and not is_faster:
        raise ValueError("activation_bits 8 is not faster than 16 on this CPU, only less exact")
    is_for_speed = activation_bits == "auto" and fmt in {"int8", "int4"} and is_faster
    if activation_bits == "8" or is_for_speed:
        return 8, "activations meet weights in 8 bits, scaled per 32 inputs"
    return 16, "activations meet weights in 16 bits" if has_integers else ""


def _why_not(fmt: Format, library: CpuLibrary | None) -> str:
    """Return why a format does not run on this CPU; empty if it does."""
    return "" if library and fmt in TILED_FORMATS else why_not_packed(fmt)


def _fastest_format(
    library: CpuLibrary | None, num_inputs: int, own_bits: str
) -> tuple[Format, str]:
    usable = [fmt for fmt in _CANDIDATES if not _why_not(fmt, library)]
    if own_bits and library:
        usable.append("own")
    if not usable:
        return "none", f"quantization none: fp16 does not run here ({why_not_packed('fp16')})"
    if len(usable) == 1:
        return usable[0], f"quantization {usable[0]}: the only near-lossless format of this CPU"
    times = _remembered_times(usable, library, num_inputs, _own_bits(own_bits))
    fastest = min(usable, key=lambda fmt: _score(fmt, times[fmt]))
    rows = "/".join(map(str, TIMED_ROWS))
    measured = ", ".join(f"{fmt} {_milliseconds(times[fmt])}" for fmt in usable)
    what = f" (the file's {own_bits})" if fastest == "own" else ""
    return fastest, f"quantization {fastest}{what}: the fastest of {measured} ms ({rows} rows)"


def _own_bits(names: str) -> int:
    """Return the bits that stand for a file's integers in a measurement."""
    return _MANY_BITS if str(_MANY_BITS) in names.partition(" ")[0] else _FEW_BITS


def _score(fmt: Format, times_s: list[float]) -> float:
    mean_s = math.prod(times_s) ** (1 / len(times_s))
    return mean_s / (_OWN_ADVANTAGE if fmt == "own" else 1)


def _milliseconds(times_s: list[float]) -> str:
    return "/".join(f"{1000 * one:.3g}" for one in times_s)


# ---- measurements --------------------------------------------------------------------------------

Times = dict[str, list[float]]


def _remembered_times(
    formats: list[Format], library: CpuLibrary | None, num_inputs: int, own_bits: int
) -> Times:
    key = repr((formats, _machine(library), num_inputs, own_bits))
    name = hashlib.sha256(key.encode()).hexdigest()
    path = octavo_home() / "timings" / f"{name[:16]}.json"
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        if _is_whole(found, formats):
            return cast("Times", found)
    times = time_formats(
        {fmt: _packer(fmt, library, own_bits) for fmt in formats},
        (max(_TIMED_WEIGHTS // num_inputs, 1), num_inputs),
        _BUDGET_S,
    )
    # A file that is not written, or half written, costs the next start this measurement.
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(times))
    return times


def _is_whole(found: object, formats: list[Format]) -> bool:
    return isinstance(found, dict) and all(
        isinstance(times_s := found.get(fmt), list)
        and len(times_s) == len(TIMED_ROWS)
        and all(isinstance(one, float) and 0 < one < math.inf for one in times_s)
        for fmt in formats
    )


def _machine(library: CpuLibrary | None) -> tuple[object, ...]:
    """Return all that a measurement depends on but the shape."""
    versions = (torch.__version__, library.digest, library.isa) if library else (torch.__version__,)
    return (cpu_model(), *versions, torch.get_num_threads())


def _packer(fmt: Format, library: CpuLibrary | None, own_bits: int) -> Callable[[Tensor], Linear]:
    def pack_one(weight: Tensor) -> Linear:
        if library and fmt == "own":
            return TiledLinear(pack_integers(_integers(weight, own_bits), None, Arena()), library)
        if library and fmt in TILED_FORMATS:
            return TiledLinear(pack_floats(weight, None, Arena()), library)
        return pack(weight.to(staging_dtype(fmt, torch.float32)), None, fmt)

    return pack_one


def _integers(weight: Tensor, bits: int) -> QuantizedRows:
    """Return any integers of the shape of a weight, with a scale and a minimum to 32 inputs."""
    outputs, inputs = weight.shape
    codes = torch.randint(0, 2**bits, (outputs, inputs), dtype=torch.uint8)
    factors = torch.rand(outputs, inputs // _GROUP_INPUTS)
    return QuantizedRows(codes, factors, factors, bits)


def time_formats(
    packers: Mapping[Format, Callable[[Tensor], Linear]], shape: tuple[int, int], budget_s: float
) -> Times:
    """Return the best time of each format's product at each of `TIMED_ROWS`, in seconds.

    The formats take turns, so a slow moment of the machine meets all of them.
    """
    weight = torch.randn(shape)
    linears = {fmt: packer(weight.clone()) for fmt, packer in packers.items()}
    times: Times = {fmt: [math.inf] * len(TIMED_ROWS) for fmt in packers}
    inputs = [torch.randn(rows, shape[1]) for rows in TIMED_ROWS]
    deadline = time.perf_counter() + budget_s
    for turn in range(1_000):
        for fmt, linear in linears.items():
            for at, x in enumerate(inputs):
                begin = time.perf_counter()
                linear(x.to(linear.in_dtype))
                elapsed_s = time.perf_counter() - begin
                # The first turn touches everything for the first time.
                if turn:
                    times[fmt][at] = min(times[fmt][at], elapsed_s)
        if turn > 1 and time.perf_counter() > deadline:
            break
    return times


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
