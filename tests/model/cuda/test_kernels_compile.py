"""Our Triton kernels compile to machine code, without a GPU.

`attention/test_contract.py` and `test_ops.py` test their results, in the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "compile_kernels.py"
#: Shared memory one program may take (CUDA C++ programming guide, compute capabilities).
MAX_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
#: Arguments whose address, or whose width (that of the longest row), differs from step to step.
OF_A_STEP = {
    *("positions_ptr", "kv_slots_ptr", "query_starts_ptr", "seq_lens_ptr"),
    *("table_ptr", "table_stride"),
}


def test_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    root = SCRIPT.parent.parent.parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, MAX_SHARED_BYTES)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {"decode", "combine", "prompt", "store", "rms_norm", "silu_and_mul", "rope"}
    kernels.add("coded_product")
    assert {(line["kernel"], line["capability"]) for line in found} == {
        (f"{name}_kernel", capability) for name in kernels for capability in MAX_SHARED_BYTES
    }
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
    stores = [line["rounding"] for line in found if line["kernel"] == "store_kernel"]
    assert stores == [["div.rn.f32"]] * 3 * len(MAX_SHARED_BYTES)
    # A query's sums have one order, with few lanes of a program and with many: a draft changes no
    # bit. Float32 has no such instructions.
    decodes = [line for line in found if line["kernel"] == "decode_kernel" and line["products"]]
    for capability in MAX_SHARED_BYTES:
        products = [line["products"] for line in decodes if line["capability"] == capability]
        assert len(products) > 4
        assert all(one == products[0] for one in products)
