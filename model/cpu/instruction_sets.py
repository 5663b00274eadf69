"""The instruction sets that the compiled CPU operations are built for, and those of this CPU.

Each is one compilation of csrc/kernels.cpp (ADR 17; for Arm ADR 23).
"""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
#: Of each architecture, best first.
ISAS_OF = {
    "x86_64": ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2_vnni", "avx2", "scalar"),
    "aarch64": ("neon_bf16", "neon_dotprod", "neon", "scalar"),
}
#: Those of this machine's architecture: plain C++ alone where it is another one.
ISAS = ISAS_OF.get(platform.machine(), ("scalar",))

_AVX512_FLAGS = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
    "-mprefer-vector-width=512",
)
_AVX512 = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
_AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
_BF16_FLAGS = (*_AVX512_FLAGS, "-mavx512vnni", "-mavx512bf16")
_NEON = "-DOCTAVO_NEON"
ISA_FLAGS = {
    "scalar": (),
    "avx2": _AVX2_FLAGS,
    "avx2_vnni": (*_AVX2_FLAGS, "-mavxvnni"),
    "avx512": _AVX512_FLAGS,
    "avx512_vnni": (*_AVX512_FLAGS, "-mavx512vnni"),
    "avx512_bf16": _BF16_FLAGS,
    "amx": (*_BF16_FLAGS, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "neon": (_NEON,),
    "neon_dotprod": (_NEON, "-march=armv8.2-a+dotprod"),
    # CPUs with BF16 may lack other instructions of armv8.6-a.
    "neon_bf16": (_NEON, "-march=armv8.2-a+dotprod+bf16+i8mm"),
}
#: The names that torch (x86) and Linux (Arm) have for the instructions of each set, best last.
_CAPABILITIES: dict[str, tuple[str, ...]] = {
    "avx2": ("avx2", "fma3", "f16c"),
    "avx2_vnni": ("avx2", "fma3", "f16c", "avx_vnni"),
    "avx512": _AVX512,
    "avx512_vnni": (*_AVX512, "avx512_vnni"),
    "avx512_bf16": (*_AVX512, "avx512_vnni", "avx512_bf16"),
    "amx": (*_AVX512, "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"),
    "neon": ("asimd",),
    "neon_dotprod": ("asimd", "asimddp"),
    "neon_bf16": ("asimd", "asimddp", "bf16", "i8mm"),
}


def best_isas(machine: str, features: set[str]) -> tuple[str, ...]:
    """Return the best instruction set of a CPU, and the next where a system may forbid it.

    `machine`: the architecture; `features`: its instructions, by the names of `_CAPABILITIES`.
    """
    known = ISAS_OF.get(machine, ())
    usable = [isa for isa, names in _CAPABILITIES.items() if isa in known and features >= {*names}]
    best = usable[-1:] or ["scalar"]
    return ("amx", "avx512_bf16") if best == ["amx"] else tuple(best)


def cpu_features() -> set[str]:
    """Return the instructions of this CPU, by the names of `_CAPABILITIES`."""
    if platform.machine() == "aarch64":
        return set(_cpuinfo().get("Features", "").split())
    return {name for name, is_there in torch.cpu.get_capabilities().items() if is_there}


def cpu_model() -> str:
    """Return the CPU's name; on Arm, Linux has numbers for its maker and its design."""
    found = _cpuinfo()
    names = ("model name", "CPU implementer", "CPU part")
    model = " ".join(found[name] for name in names if name in found)
    return model or platform.processor() or platform.machine()


def _cpuinfo() -> dict[str, str]:
    """Return the properties of the first processor."""
    found: dict[str, str] = {}
    with suppress(OSError):
        for line in CPUINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    return found
