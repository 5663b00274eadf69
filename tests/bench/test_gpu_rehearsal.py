"""The whole of `make bench-gpu`, rehearsed: every script, every step, no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu" / "run.sh"
PARTS = ("imports", "kernels", "dtypes", "proof", "measure", "http", "peer")


@pytest.mark.slow
def test_every_step_can_be_rehearsed_without_a_gpu(tmp_path: Path) -> None:
    environment = os.environ | {"REHEARSE": "1", "OUT": str(tmp_path), "COMMIT": "rehearsed"}
    # Its python3 is this one, with the packages installed here, not those in .whl/.
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "WHEELS": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [str(SCRIPT)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in PARTS:
        assert f"-- {name}: " in done.stdout
        assert "FAILED" not in (tmp_path / f"gpu-{name}.txt").read_text()
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert "rehearsal" in report["about"]
    assert all(row["value"] > 0 for row in report["rows"])
    records = [json.loads(line) for line in (tmp_path / "gpu-http.jsonl").read_text().splitlines()]
    assert sum(record["kind"] == "header" for record in records) == 2


def test_without_a_gpu_nothing_is_measured_as_if_there_were_one() -> None:
    for name in ("prove.py", "peer.py"):
        done = subprocess.run(
            [sys.executable, str(SCRIPT.parent / name)], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (1, "there is no GPU here\n")
