from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model import cpu_library
from model.cpu_library import CpuLibrary, build, load_cpu_library

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def library() -> CpuLibrary:
    library = load_cpu_library()
    if isinstance(library, str):
        pytest.skip(library)
    return library


def environ(home: Path, **more: str) -> dict[str, str]:
    return {"OCTAVO_HOME": str(home), **more}


@pytest.fixture
def compiler(tmp_path: Path, library: CpuLibrary) -> Path:
    """A compiler that knows one answer: it writes down its calls and links a finished library."""
    path = tmp_path / "compiler"
    path.write_text(
        "#!/bin/sh\n"
        f"echo call >> {tmp_path}/calls\n"
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && output=$2; shift; done\n'
        f'{shutil.which("cp")} {library.path} "$output"\n'
    )
    path.chmod(0o755)
    return path


def test_without_a_compiler_it_says_so(tmp_path: Path) -> None:
    assert load_cpu_library(environ=environ(tmp_path)) == "no C++ compiler found"
    missing = environ(tmp_path, CXX="/nowhere/g++", PATH="/usr/bin")
    assert load_cpu_library(environ=missing) == "no C++ compiler found"


def test_what_the_compiler_says_is_passed_on(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'x.h:1: error: no such luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    reason = load_cpu_library(environ=environ(tmp_path, CXX=str(compiler)))
    assert reason == "the C++ compiler failed: x.h:1: error: no such luck"
    assert not list(tmp_path.rglob("*.so"))


def test_a_home_that_cannot_be_written_is_told(tmp_path: Path, compiler: Path) -> None:
    (tmp_path / "file").touch()
    reason = load_cpu_library(environ=environ(tmp_path / "file", CXX=str(compiler)))
    assert "the build folder cannot be used" in str(reason)


def test_builds_at_the_same_time_are_one_build(tmp_path: Path, compiler: Path) -> None:
    variables = environ(tmp_path / "home", CXX=str(compiler))
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load_cpu_library, environ=variables) for _ in range(4)]
        libraries = [load.result() for load in loads]
    assert all(isinstance(library, CpuLibrary) for library in libraries)
    one_build = len((tmp_path / "calls").read_text().split())
    kept = load_cpu_library(environ=environ(tmp_path / "home"))
    assert isinstance(kept, CpuLibrary), "a later start needs no compiler"
    build(tmp_path / "other.so", str(compiler))
    assert len((tmp_path / "calls").read_text().split()) == 2 * one_build


def test_a_file_that_is_no_library_is_told(tmp_path: Path) -> None:
    (tmp_path / "cpu_ops.so").write_bytes(b"\x7fELF and then nothing of use")
    variables = environ(tmp_path, OCTAVO_CPU_OPS=str(tmp_path / "cpu_ops.so"))
    assert "cpu_ops.so cannot be loaded" in str(load_cpu_library(environ=variables))


def test_a_library_of_other_sources_is_told(
    tmp_path: Path, library: CpuLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels.cpp").write_text("// newer")
    monkeypatch.setattr(cpu_library, "SOURCES", tmp_path)
    variables = environ(tmp_path, OCTAVO_CPU_OPS=str(library.path))
    assert "was built from other sources" in str(load_cpu_library(environ=variables))


def test_an_instruction_set_can_be_asked_for(library: CpuLibrary) -> None:
    variables = {"OCTAVO_CPU_OPS": str(library.path), "OCTAVO_CPU_ISA": "scalar"}
    scalar = load_cpu_library(environ=variables)
    assert isinstance(scalar, CpuLibrary)
    assert scalar.isa == "scalar"
    unknown = load_cpu_library(environ=variables | {"OCTAVO_CPU_ISA": "avx1024"})
    assert "'avx1024' is not one of amx, avx512, avx2, scalar" in str(unknown)


def test_it_can_be_built_ahead(tmp_path: Path, library: CpuLibrary) -> None:
    assert library.path.exists(), "there is a compiler"
    output = tmp_path / "_cpu_ops.so"
    command = [sys.executable, "-m", "model.cpu_ops", "--output", str(output)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert isinstance(load_cpu_library(environ={"OCTAVO_CPU_OPS": str(output)}), CpuLibrary)
    assert list(tmp_path.iterdir()) == [output]


def test_where_there_is_a_compiler_there_is_the_library() -> None:
    """Elsewhere tests of compiled code are skipped without it; here its loss must not be silent."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler here")
    found = load_cpu_library()
    assert isinstance(found, CpuLibrary), found
