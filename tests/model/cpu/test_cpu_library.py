from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model.cpu import library as cpu_library
from model.cpu.instruction_sets import ISAS
from model.cpu.library import CpuLibrary, build, load_cpu_library, openmp_runtime
from waiting import TIMEOUT_S, wait_until

ROOT = Path(__file__).parents[3]


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
    build(tmp_path / "other.so", str(compiler), (kept.isa,))
    assert len((tmp_path / "calls").read_text().split()) == 2 * one_build
    build(tmp_path / "all.so", str(compiler))
    assert len((tmp_path / "calls").read_text().split()) > 3 * one_build, "all instruction sets"


def test_a_file_that_is_no_library_is_told(tmp_path: Path, library: CpuLibrary) -> None:
    path = tmp_path / "cpu_ops.so"
    variables = environ(tmp_path, OCTAVO_CPU_OPS=str(path))
    path.write_bytes(b"\x7fELF and then nothing of use")
    assert "cpu_ops.so is damaged" in str(load_cpu_library(environ=variables))
    path.write_bytes(_sealed(path.read_bytes()))
    assert "cpu_ops.so cannot be loaded" in str(load_cpu_library(environ=variables))
    path.write_bytes(library.path.read_bytes())
    _flip(path)
    assert "cpu_ops.so is damaged" in str(load_cpu_library(environ=variables))


def test_a_library_of_other_sources_is_told(
    tmp_path: Path, library: CpuLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels.cpp").write_text("// newer")
    monkeypatch.setattr(cpu_library, "SOURCES", tmp_path)
    variables = environ(tmp_path, OCTAVO_CPU_OPS=str(library.path))
    assert "was built from other sources" in str(load_cpu_library(environ=variables))


def test_a_library_of_another_architecture_is_told(tmp_path: Path, library: CpuLibrary) -> None:
    """The system's loader has no message for it."""
    here = platform.machine()
    other, number = ("x86_64", 62) if here == "aarch64" else ("aarch64", 183)
    content = bytearray(library.path.read_bytes()[:-32])
    content[18:20] = number.to_bytes(2, "little")
    path = tmp_path / "cpu_ops.so"
    path.write_bytes(_sealed(bytes(content)))
    found = load_cpu_library(environ=environ(tmp_path, OCTAVO_CPU_OPS=str(path)))
    assert found == f"{path} was built for {other}, and this CPU is {here}"


MAPS = """\
55d0c0a00000-55d0c0a01000 r--p 00000000 08:01 131 /usr/bin/python3.11
7f1c00000000-7f1c00021000 rw-p 00000000 00:00 0
7f1c10000000-7f1c10021000 r--p 00000000 08:01 132 /opt/my torch.libs/libgomp-947d5fa1.so.1.0.0
7f1c10021000-7f1c10031000 r-xp 00021000 08:01 132 /opt/my torch.libs/libgomp-947d5fa1.so.1.0.0
7f1c20000000-7f1c20021000 r--p 00000000 08:01 133 /opt/libtorch_cpu.so
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0 [stack]
"""


def test_the_openmp_runtime_of_a_process_is_found() -> None:
    assert openmp_runtime(MAPS) == "/opt/my torch.libs/libgomp-947d5fa1.so.1.0.0"
    assert not openmp_runtime(MAPS.replace("libgomp", "libgoop"))
    assert openmp_runtime(Path("/proc/self/maps").read_text()), "torch is loaded here"


def test_a_big_endian_cpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    reason = build(tmp_path / "cpu_ops.so", "no compiler")
    assert (
        reason
        == f"the compiled CPU operations are for little-endian CPUs, not {platform.machine()}"
    )


# ---- what lies on the disk -----------------------------------------------------------------------


def _sealed(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest()


def _replace(path: Path, content: bytes) -> None:
    """Change a file by another of its name: the bytes of the old one are in use, here."""
    path.unlink()
    path.write_bytes(content)


def _flip(path: Path) -> None:
    """Change one bit of the code."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    _replace(path, bytes(content))


def _make_a_folder_of(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").touch()


def _make_a_pipe_of(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": _flip,
    "cut": lambda path: _replace(path, path.read_bytes()[: path.stat().st_size // 3]),
    "empty": lambda path: _replace(path, b""),
    "longer": lambda path: _replace(path, path.read_bytes() + b"\0"),
    "shorter": lambda path: _replace(path, path.read_bytes()[:-1]),
    "a folder": _make_a_folder_of,
    "a pipe": _make_a_pipe_of,
    "a link to nowhere": _link_to_nowhere,
    "writable by all": lambda path: path.chmod(0o757),
    "in a folder that all can write to": lambda path: path.parent.chmod(0o777),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_kept_build_that_was_damaged_is_built_anew(
    damage: Callable[[Path], None], tmp_path: Path, compiler: Path
) -> None:
    variables = environ(tmp_path / "home", CXX=str(compiler))
    first = load_cpu_library(environ=variables)
    assert isinstance(first, CpuLibrary), first
    assert first.notes == ()
    damage(first.path)
    without_compiler = load_cpu_library(environ=environ(tmp_path / "home"))
    assert str(first.path.parent) in str(without_compiler)
    assert str(without_compiler).endswith(", and no C++ compiler found")
    repaired = load_cpu_library(environ=variables)
    assert isinstance(repaired, CpuLibrary), repaired
    assert repaired.notes[0].endswith(": the compiled CPU operations were built anew")
    again = load_cpu_library(environ=environ(tmp_path / "home"))
    assert isinstance(again, CpuLibrary), again
    assert again.notes == ()
    assert stat.S_IMODE(again.path.parent.stat().st_mode) == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder away")
@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_belongs_to_another_user_is_not_loaded(
    what: str, tmp_path: Path, compiler: Path
) -> None:
    variables = environ(tmp_path / "home", CXX=str(compiler))
    first = load_cpu_library(environ=variables)
    assert isinstance(first, CpuLibrary), first
    os.chown(first.path.parent if what == "folder" else first.path, 65534, 65534)
    found = load_cpu_library(environ=variables)
    if what == "folder":
        assert "belongs to another user, and the build folder cannot be used: set OCT" in str(found)
    else:
        assert isinstance(found, CpuLibrary), found
        assert "cpu_ops.so belongs to another user: the compiled" in found.notes[0]


def test_a_damaged_build_where_none_can_be_made_is_told(tmp_path: Path, compiler: Path) -> None:
    variables = environ(tmp_path / "home", CXX=str(compiler))
    first = load_cpu_library(environ=variables)
    assert isinstance(first, CpuLibrary), first
    _flip(first.path)
    lock = first.path.with_name("lock")
    lock.unlink()
    lock.mkdir()
    reason = str(load_cpu_library(environ=variables))
    assert "cpu_ops.so is damaged, and the build folder cannot be used: " in reason


LOAD = "from model.cpu.library import load_cpu_library; print(load_cpu_library())"


def _start(home: Path, *, python: str = LOAD, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", python],
        cwd=ROOT,
        env={**os.environ, **environ(home, **more)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _said(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    return text


@pytest.fixture
def quick_compiler(tmp_path: Path, library: CpuLibrary) -> str:
    """The real one, in a hurry."""
    del library
    path = tmp_path / "quick"
    path.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@" -O0\n')
    path.chmod(0o755)
    return str(path)


def test_a_killed_build_leaves_nothing_behind_the_next(tmp_path: Path, quick_compiler: str) -> None:
    home = tmp_path / "home"
    killed = _start(home, CXX=quick_compiler)
    wait_until(lambda: killed.poll() is not None or list(home.glob("build/*/.build-*/*.o")))
    assert killed.poll() is None
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    (folder,) = (home / "build").iterdir()
    assert list(folder.glob(".build-*"))
    of_another_version = home / "build/0123/.build-abc"
    of_another_version.mkdir(parents=True)
    (of_another_version.parent / "lock").touch()
    (of_another_version / "0.o").touch()
    under_way = home / "build/4567/.build-abc"
    under_way.mkdir(parents=True)
    with (under_way.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        both = [_start(home, CXX=quick_compiler) for _ in range(2)]
        for one in both:
            assert "CpuLibrary(" in _said(one)
    assert sorted(path.name for path in folder.iterdir()) == ["cpu_ops.so", "lock"]
    assert not of_another_version.exists()
    assert under_way.exists(), "its builder is alive"


#: As on a full disk: no file may become larger than an object is.
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); " + LOAD


def test_a_full_disk_is_told(tmp_path: Path, quick_compiler: str) -> None:
    said = _said(_start(tmp_path / "home", python=FULL, CXX=quick_compiler))
    assert said.startswith("the C++ compiler failed: "), said
    assert not list(tmp_path.rglob("*.so"))
    assert not list(tmp_path.rglob(".build-*"))


@pytest.mark.usefixtures("library")
def test_an_instruction_set_can_be_asked_for() -> None:
    variables = {**os.environ, "OCTAVO_CPU_ISA": "scalar"}
    scalar = load_cpu_library(environ=variables)
    assert isinstance(scalar, CpuLibrary)
    assert scalar.isa == "scalar"
    unknown = load_cpu_library(environ=variables | {"OCTAVO_CPU_ISA": "avx1024"})
    assert f"'avx1024' is not one of {', '.join(ISAS)}" in str(unknown)


def test_it_can_be_built_ahead(tmp_path: Path, quick_compiler: str) -> None:
    output = tmp_path / "ahead" / "_cpu_ops.so"
    output.parent.mkdir()
    command = [sys.executable, "-m", "model.cpu.ops", "--output", str(output)]
    environment = {**os.environ, "CXX": quick_compiler}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
    assert isinstance(load_cpu_library(environ={"OCTAVO_CPU_OPS": str(output)}), CpuLibrary)
    assert list(output.parent.iterdir()) == [output]


def test_where_there_is_a_compiler_there_is_the_library() -> None:
    """Elsewhere tests of compiled code are skipped without it; here its loss must not be silent."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler here")
    found = load_cpu_library()
    assert isinstance(found, CpuLibrary), found
