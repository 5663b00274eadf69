"""One place knows the version: the build reads it, and a checkout that is not installed has it."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

from server import __version__

ROOT = Path(__file__).parent.parent.parent


def test_a_checkout_that_is_not_installed_knows_its_version(tmp_path: Path) -> None:
    """Its dependencies are there, its own metadata is not."""
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "octavo" not in entry.name:
            (tmp_path / entry.name).symlink_to(entry)
    assert (tmp_path / "fastapi").exists()
    code = (
        f"import runpy, sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]; "
        "sys.argv[1:] = ['version']; runpy.run_module('server', run_name='__main__')"
    )
    # -S: without the environment's own packages, whose metadata would be found.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == (f"octavo {__version__}\n", "")


def test_the_build_takes_the_same_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == __version__
