"""The packages that a run on a GPU machine needs beside our own code, and a check that they came.

`python bench/gpu/needs.py pins`: the run-time requirements and imports of the code that runs
there, with their own requirements, without the packages that the machine has. Read from the
metadata of this environment, so all of them have to be installed here (`make check`).
`python bench/gpu/needs.py check`: imports every module that this code imports, also inside
functions; exit status 1 if one cannot be imported.
"""

# ruff: noqa: T201 - the result is printed

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import sys
import time
import tomllib
from collections.abc import Set as AbstractSet
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
#: The code that runs there.
FOLDERS = ("cache", "configs", "loadtest", "model", "scheduler", "server", "bench/gpu")
#: The packages of the machine that stay: large, or tied to a version by something large.
THERE = {"huggingface-hub", "numpy", "tokenizers", "torch", "transformers", "triton"}
#: The machine that requirements are evaluated for.
TARGET = {
    "implementation_name": "cpython",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": "3.12.0",
    "python_version": "3.12",
    "sys_platform": "linux",
}


def imports() -> list[tuple[str, str]]:
    """Return (module, name taken from it or nothing) of each import in the code that runs there."""
    found: set[tuple[str, str]] = set()
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update((alias.name, "") for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                found.update((node.module or "", alias.name) for alias in node.names)
    return sorted(found)


def roots() -> list[Requirement]:
    """Return the run-time requirements, and the packages of all imports."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tops = {module.partition(".")[0] for module, _ in imports()}
    ours = {*FOLDERS, *(path.stem for path in Path(__file__).parent.glob("*.py"))}
    packages = importlib.metadata.packages_distributions()
    imported = [packages[top][0] for top in tops - ours - sys.stdlib_module_names]
    return [Requirement(line) for line in (*project["dependencies"], *imported)]


def closure(waiting: list[Requirement], without: AbstractSet[str] = frozenset()) -> set[str]:
    """Return the names of these and all their requirements, without those in `without`."""
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if name in without or (name, extra) in seen:
                continue
            seen.add((name, extra))
            target = TARGET | {"extra": extra}
            further = map(Requirement, importlib.metadata.requires(name) or ())
            waiting += [one for one in further if not one.marker or one.marker.evaluate(target)]
    return {name for name, _ in seen}


def pins() -> list[str]:
    """Return the pins of the missing packages; raise KeyError for one without a pin."""
    lines = (ROOT / "constraints.txt").read_text().split()
    pinned: dict[str, str] = {
        canonicalize_name(line.partition("==")[0]): line for line in lines if "==" in line
    }
    return sorted(pinned[name] for name in closure(roots(), without=THERE))


def why_not(module: str, name: str) -> str:
    """Import a module; return the error, or nothing."""
    try:
        found = importlib.import_module(module)
        if name and not hasattr(found, name):
            importlib.import_module(f"{module}.{name}")
    except Exception as error:  # noqa: BLE001 - any error is the finding
        return f"{type(error).__name__}: {error}"
    return ""


def check() -> int:
    """Import everything, and print the modules that cannot be imported."""
    began_s, needed = time.perf_counter(), imports()
    failed = {
        (module, name): reason for module, name in needed if (reason := why_not(module, name))
    }
    for (module, name), reason in failed.items():
        print(f"FAILED  import of {module} {name}: {reason}", flush=True)
    taken_s = time.perf_counter() - began_s
    print(f"{len(needed) - len(failed)} of {len(needed)} imports in {taken_s:.1f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:] == ["pins"]:
        print(*pins(), sep="\n")
    elif sys.argv[1:] == ["check"]:
        sys.exit(check())
    else:
        sys.exit(__doc__)
