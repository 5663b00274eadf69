"""Our Triton kernels compile to machine code, without a GPU.

`attention/test_contract.py` and `test_ops.py` test their results, in the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "compile_kernels.py"
#: Shared memory one program may take (CUDA C++ programming guide, compute capabilities).
MAX_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
#: Arguments whose address, or whose width (that of the longest row), differs from step to step.
OF_A_STEP = {
    *("positions_ptr", "kv_slots_ptr", "query_starts_ptr", "seq_lens_ptr"),
    *("table_ptr", "table_stride", "row_sinks_ptr", "row_windows_ptr", "sink_positions_ptr"),
}
KERNELS = {
    *("decode", "combine", "prompt", "store", "rotate"),
    *("rms_norm", "silu_and_mul", "rope", "coded_product"),
}


def compiled(folder: Path, *flags: str) -> list[dict[str, Any]]:
    """Return a description of each compiled kernel."""
    root = SCRIPT.parent.parent.parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder)}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags, *map(str, MAX_SHARED_BYTES)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict[str, Any]]) -> None:
    for line in found:
        # Compiled once: not anew, amid requests, for a step whose arrays begin elsewhere.
        assert OF_A_STEP.isdisjoint(line["specialized"])
        written = {"rope_kernel": "q_ptr", "store_kernel": "keys_ptr"}.get(
            line["kernel"], "out_ptr"
        )
        assert written in line["specialized"]
        assert line["cubin_bytes"] > 0
        assert line["shared_bytes"] <= MAX_SHARED_BYTES[line["capability"]]
        # Codes are the bytes that torch computes: every operation rounds to nearest, by itself.
        if line["kernel"] == "store_kernel":
            assert line["rounding"] == ["div.rn.f32"]
        if line["kernel"] == "rotate_kernel":
            assert line["rounding"] == []


def check_products(found: list[dict[str, Any]], least: dict[int, int]) -> None:
    """Check that a query's sums have one order, so that neither drafts nor views change a bit.

    That is with few lanes of a program and with many. Float32 has no such instructions.
    """
    decodes = [line for line in found if line["kernel"] == "decode_kernel" and line["products"]]
    for capability, number in least.items():
        products = [line["products"] for line in decodes if line["capability"] == capability]
        assert len(products) >= number
        assert all(one == products[0] for one in products)


def test_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    """On a Hopper all kernels, on an Ampere the kernels that need most memory."""
    found = compiled(tmp_path)
    kernels = {(line["kernel"], line["capability"]) for line in found}
    on_ampere = {("decode_kernel", 80), ("prompt_kernel", 80)}
    assert kernels == {(f"{name}_kernel", 90) for name in KERNELS} | on_ampere
    assert sum(line["kernel"] == "store_kernel" for line in found) == 3
    check(found)
    check_products(found, {80: 2, 90: 3})


@pytest.mark.slow
def test_every_variant_of_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    found = compiled(tmp_path, "--all")
    kernels = {(line["kernel"], line["capability"]) for line in found}
    assert kernels == {(f"{name}_kernel", one) for name in KERNELS for one in MAX_SHARED_BYTES}
    check(found)
    check_products(found, dict.fromkeys(MAX_SHARED_BYTES, 9))
