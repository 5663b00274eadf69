from __future__ import annotations

import platform
from pathlib import Path

import pytest

from model.cpu import instruction_sets
from model.cpu.instruction_sets import ISA_FLAGS, ISAS, ISAS_OF, best_isas, cpu_features, cpu_model

#: The "Features" of Linux on a Raspberry Pi 4, Graviton 2, Graviton 3 and Apple M2, shortened.
CORTEX_A72 = "fp asimd evtstrm crc32 cpuid"
NEOVERSE_N1 = "fp asimd evtstrm aes atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs"
NEOVERSE_V1 = NEOVERSE_N1 + " sha3 sve paca pacg svei8mm svebf16 i8mm bf16 dgh rng"
APPLE_M2 = NEOVERSE_N1 + " sha3 flagm sb paca pacg dcpodp flagm2 frint i8mm bf16 bti"
#: torch's names on a Zen 4.
ZEN_4 = "avx2 fma3 f16c avx512_f avx512_bw avx512_dq avx512_vl avx512_vnni avx512_bf16"
CASES = {
    ("aarch64", ""): ("scalar",),
    ("aarch64", CORTEX_A72): ("neon",),
    ("aarch64", NEOVERSE_N1): ("neon_dotprod",),
    ("aarch64", NEOVERSE_N1 + " bf16"): ("neon_dotprod",),
    ("aarch64", NEOVERSE_V1): ("neon_bf16",),
    ("aarch64", APPLE_M2): ("neon_bf16",),
    ("x86_64", ""): ("scalar",),
    ("x86_64", "avx2 fma3 f16c"): ("avx2",),
    ("x86_64", "avx2 fma3 f16c avx_vnni"): ("avx2_vnni",),
    ("x86_64", ZEN_4): ("avx512_bf16",),
    # A system may forbid matrix instructions: then the next set is needed.
    ("x86_64", ZEN_4 + " amx_tile amx_bf16 amx_int8"): ("amx", "avx512_bf16"),
    # The names of another architecture mean nothing.
    ("x86_64", NEOVERSE_V1): ("scalar",),
    ("riscv64", NEOVERSE_V1): ("scalar",),
}


@pytest.mark.parametrize(("machine", "features"), CASES)
def test_the_best_instruction_set_of_a_cpu(machine: str, features: str) -> None:
    assert best_isas(machine, set(features.split())) == CASES[machine, features]


def test_every_instruction_set_has_its_flags() -> None:
    assert {isa for isas in ISAS_OF.values() for isa in isas} == set(ISA_FLAGS)
    assert ISAS_OF.get(platform.machine(), ("scalar",)) == ISAS


ARM_CPUINFO = f"""processor\t: 0
BogoMIPS\t: 243.75
Features\t: {NEOVERSE_N1}
CPU implementer\t: 0x41
CPU part\t: 0xd0c

processor\t: 1
Features\t: none
CPU implementer\t: 0x41
CPU part\t: 0xd05
"""


def test_an_arm_cpu_is_known_by_what_linux_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(instruction_sets, "CPUINFO", cpuinfo)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert (cpu_features(), cpu_model()) == (set(), "aarch64")
    cpuinfo.write_text(ARM_CPUINFO)
    assert cpu_features() == set(NEOVERSE_N1.split())
    assert cpu_model() == "0x41 0xd0c"


def test_an_x86_cpu_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 9R14\n")
    monkeypatch.setattr(instruction_sets, "CPUINFO", cpuinfo)
    assert cpu_model() == "AMD EPYC 9R14"
