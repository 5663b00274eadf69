"""Seeds one bug after another, and checks whether the state machine of that package finds it.

`python -m tools.seeded_bugs cache [NAME ...]`: exits 1 if a bug stays unfound. Not part of the test
suite: it measures how good the suite is. Each bug replaces a piece of source text in a copy of the
project, so the checkout is never changed.
"""

# ruff: noqa: T201 - a script that reports

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from tools.bugs import (
    COMPACTION_BUGS,
    FAULT_BUGS,
    OVERLAP_BUGS,
    PROGRESS_BUGS,
    SCHEDULER_BUGS,
    SPECULATION_BUGS,
    WINDOW_BUGS,
    Bug,
)
from tools.cache_bugs import CACHE_BUGS, GROUP_BUGS

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT_S = 300

#: Search longer than the suite does, remember nothing, and do not simplify a failure.
PROFILE = """
from hypothesis import HealthCheck, Phase, settings
settings.register_profile(
    "seeded", max_examples=5_000, database=None, derandomize=True, deadline=None,
    phases=[Phase.generate], suppress_health_check=list(HealthCheck),
)
"""


class Suite(NamedTuple):
    test_file: str
    bugs: list[Bug]


SUITES = {
    "cache": Suite("tests/cache/test_machine.py", CACHE_BUGS),
    "groups": Suite("tests/cache/test_groups.py", GROUP_BUGS),
    "scheduler": Suite("tests/scheduler/test_machine.py", SCHEDULER_BUGS),
    "overlap": Suite("tests/scheduler/test_overlap.py", OVERLAP_BUGS),
    "windows": Suite("tests/scheduler/test_windows.py", WINDOW_BUGS),
    "compaction": Suite("tests/scheduler/test_compaction.py", COMPACTION_BUGS),
    "progress": Suite("tests/scheduler/test_progress.py", PROGRESS_BUGS),
    "speculation": Suite("tests/scheduler/test_speculation.py", SPECULATION_BUGS),
    "faults": Suite("tests/scheduler/test_faults.py", FAULT_BUGS),
}


def copy_project(folder: Path) -> None:
    """Copy the tests' imports; not the checkout's history, models and environments."""
    for package in ("cache", "configs", "model", "scheduler", "server", "tests"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "seeded_profile.py").write_text(PROFILE)


def seed(folder: Path, bug: Bug) -> str:
    """Put a bug in; the file's text as it was."""
    path = folder / bug.file
    text = path.read_text()
    if text.count(bug.old) != 1 or bug.old == bug.new:
        raise SystemExit(f"{bug.name}: the text to replace must occur exactly once in {bug.file}")
    path.write_text(text.replace(bug.old, bug.new))
    return text


def is_found(folder: Path, test_file: str, profile: str = "seeded") -> bool:
    """Run the state machine: whether it failed. A run that could not start ends the script."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "seeded_profile"]
    command = [sys.executable, "-B", "-m", "pytest", *options, "--hypothesis-profile", profile]
    try:
        run = subprocess.run(
            [*command, test_file],
            cwd=folder,
            check=False,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return False
    if run.returncode not in {0, 1}:
        raise SystemExit(run.stdout + run.stderr)
    return run.returncode == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", choices=sorted(SUITES))
    parser.add_argument("names", nargs="*", help="only bugs whose name contains one of these")
    options = parser.parse_args()
    suite = SUITES[options.package]
    names = options.names or [""]
    missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_project(folder)
        # The profile of the tests: the default one has a deadline, which a busy machine exceeds.
        if is_found(folder, suite.test_file, profile="any speed"):
            raise SystemExit(f"{suite.test_file} fails without any bug seeded")
        for bug in suite.bugs:
            if not any(name in bug.name for name in names):
                continue
            text = seed(folder, bug)
            start_s = perf_counter()
            found = is_found(folder, suite.test_file)
            duration_s = perf_counter() - start_s
            (folder / bug.file).write_text(text)
            missed += not found
            print(f"{'found' if found else 'MISSED':7}{duration_s:6.1f} s  {bug.name}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
