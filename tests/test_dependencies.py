"""Imported packages are declared, declared ones are pinned, and images contain them all."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: list[str] = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
SOURCES = sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))


def _names(lines: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


RUN_TIME = _names(PROJECT["project"]["dependencies"])
#: Packages that only the extras for users bring.
EXTRAS = {
    name
    for extra, lines in PROJECT["project"]["optional-dependencies"].items()
    if extra != "dev"
    for name in _names(lines)
}
#: By the name to import, the distributions that have it.
INSTALLED = metadata.packages_distributions()


def _imports(path: Path) -> Iterator[str]:
    """Return the names of all imported modules, also inside functions or by a string."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(one.value) for one in node.args if isinstance(one, ast.Constant))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_imported_is_declared(path: Path) -> None:
    """Not merely brought by something else that is declared: that may stop to bring it."""
    tops = {module.partition(".")[0] for module in _imports(path)}
    undeclared = {
        top
        for top in tops - set(PACKAGES) - sys.stdlib_module_names
        if not {canonicalize_name(name) for name in INSTALLED[top]} & (RUN_TIME | EXTRAS)
    }
    assert undeclared == set()


def test_what_is_declared_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().split()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line}
    assert (RUN_TIME | EXTRAS) - pinned == set()


def test_the_image_copies_the_packages_of_the_wheel() -> None:
    """A folder that is not copied is missing from the image's wheel, without an error."""
    copied = re.findall(r"^COPY (\w+) \1$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    sent = re.findall(r"^!(\w+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert sorted(copied) == sorted(PACKAGES)
    assert set(PACKAGES) <= set(sent)


def test_the_cuda_image_has_the_extra_of_that_name() -> None:
    stages = (ROOT / "Dockerfile").read_text().split("\nFROM ")
    [cuda] = [stage for stage in stages if "AS build-cuda\n" in stage]
    [wheel] = [stage for stage in stages if "AS wheel\n" in stage]
    assert "['optional-dependencies']['cuda']" in wheel
    assert "--requirement requirements-cuda.txt" in cuda
