"""The packages carried to a GPU machine without a network are all that it lacks to run Octavo."""

from __future__ import annotations

import runpy
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
#: The processes that `run.sh` starts: API, engine, loadtest.
PROGRAMS = ("server.__main__", "model.assemble", "loadtest.__main__")


@pytest.fixture(scope="module")
def needs() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "bench/gpu/needs.py"))


def names(pins: list[str]) -> set[str]:
    return {pin.partition("==")[0].lower().replace("_", "-") for pin in pins}


def test_all_programs_load_with_nothing_but_that(needs: dict[str, Any], tmp_path: Path) -> None:
    """In an environment of the carried packages, those there, and their requirements."""
    there = needs["closure"]([Requirement(name) for name in needs["THERE"]])
    for name in names(needs["pins"]()) | there:
        for file in metadata.files(name) or ():
            link = tmp_path / file.parts[0]
            if link.name != ".." and not link.exists():
                link.symlink_to(Path(sysconfig.get_path("purelib")) / link.name)
    assert not (tmp_path / "pytest").exists()
    code = (
        f"import importlib, sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]; "
        f"[importlib.import_module(name) for name in {PROGRAMS}]"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_required_in_turn_is_carried_and_what_is_there_is_not(
    needs: dict[str, Any],
) -> None:
    found = names(needs["pins"]())
    # Of fastapi; imported inside a function; by loadtest alone; a requirement of gguf.
    assert {"opentelemetry-api", "llguidance", "psutil", "urllib3"} <= found
    assert found.isdisjoint(needs["THERE"])
    assert not any(name.startswith("nvidia") for name in found)
    # For development, or only required by packages that are there.
    assert found.isdisjoint({"pytest", "mypy", "schemathesis", "sympy", "networkx"})


@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        ("not_there", "", "ModuleNotFoundError: No module named 'not_there'"),
        ("json", "not_there", "ModuleNotFoundError: No module named 'json.not_there'"),
        ("xml", "dom", ""),
        ("json", "loads", ""),
    ],
)
def test_an_import_says_what_is_in_its_way(
    needs: dict[str, Any], module: str, name: str, reason: str
) -> None:
    assert needs["why_not"](module, name).startswith(reason)
    assert bool(needs["why_not"](module, name)) == bool(reason)
