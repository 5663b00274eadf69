"""Finds, builds and loads the compiled CPU operations, a shared library.

The library (model/cpu/csrc) has a C interface and is not linked against torch. So a build needs
only a C++ compiler and a few seconds, and a binary stays valid when torch is updated. It has code
for several instruction sets, of x86 or of Arm, and detects the CPU's. Without the right checksum at
its end it is not loaded. Knows nothing of the operations (`model/cpu/ops.py`,
`model/attention/cpu.py`).
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# Also loads OpenMP's runtime into the process, which the library's threads come from.
import torch
from torch import Tensor

from model.cpu import instruction_sets
from model.cpu.instruction_sets import ISA_FLAGS, ISAS, best_isas, cpu_features
from model.weights.source import octavo_home

SOURCES = Path(__file__).parent / "csrc"
#: The `DType` of csrc/kernels.h.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
#: The same for pages of single tokens: codes of int8, fp8, and two of int4 a byte.
PAGE_CODES = DTYPE_CODES | {torch.int8: 3, torch.float8_e4m3fn: 4, torch.uint8: 5}
#: The same for pages that are encoded as a whole, by the bits of a code.
WHOLE_PAGE_CODES = {4: 6, 2: 7}

BASE_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi")
_OPENMP_NAMES = ("libgomp", "libomp", "libiomp")
_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
_BUILD_TIMEOUT_S = 1200
_BUILD_PREFIX = ".build-"
_CHECKSUM_BYTES = hashlib.sha256().digest_size
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
_MATRIX, _ROWS = (_POINTER, _INT), (_POINTER, _LONG, _LONG)
#: Result and parameters of each function of csrc/octavo_cpu.cpp.
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "octavo_sources": (ctypes.c_char_p, ()),
    "octavo_supports": (ctypes.c_bool, (ctypes.c_char_p,)),
    "octavo_kernels": (_POINTER, (ctypes.c_char_p,)),
    "octavo_attention_new": (_POINTER, (*(_POINTER,) * 4, _INT, _LONG, *(_INT,) * 4, _FLOAT, _INT)),
    "octavo_attention_free": (None, (_POINTER,)),
    "octavo_attention_join": (None, (*(_POINTER,) * 3, _INT)),
    "octavo_attention_plan": (
        ctypes.c_char_p,
        (*(_POINTER,) * 4, _LONG, _POINTER, _INT, _LONG, _INT, *(_POINTER,) * 3),
    ),
    "octavo_attention_attend": (
        None,
        (_POINTER, _INT, _INT, *_ROWS, *_ROWS, *_ROWS, _POINTER, *_ROWS),
    ),
    "octavo_norm": (
        None,
        (_POINTER, _LONG, _LONG, *_MATRIX, _LONG, _POINTER, *_MATRIX, _FLOAT, *_MATRIX),
    ),
    "octavo_rope": (
        None,
        (_POINTER, _LONG, _INT, *_ROWS, _INT, *_ROWS, _INT, _POINTER, _POINTER, _INT),
    ),
    "octavo_silu_mul": (None, (_POINTER, _LONG, _LONG, _POINTER, _LONG, _INT, _POINTER)),
    "octavo_product": (
        None,
        (*(_POINTER,) * 2, _LONG, _LONG, _POINTER, _LONG, _POINTER, _INT),
    ),
    "octavo_look_up": (ctypes.c_bool, (*(_POINTER,) * 2, _LONG, _LONG, _POINTER, _LONG, _POINTER)),
    "octavo_pack": (
        ctypes.c_bool,
        (*(_POINTER,) * 2, _INT, *(_LONG,) * 7, *(_POINTER,) * 3),
    ),
    "octavo_decoder_new": (_POINTER, (*(_POINTER,) * 2, _FLOAT, _POINTER, _LONG, _POINTER)),
    "octavo_decoder_free": (None, (_POINTER,)),
    "octavo_decoder_forward": (None, (*(_POINTER,) * 8, _LONG)),
}


def strided(heads: Tensor) -> tuple[int, int, int]:
    """Return the `_ROWS` of a tensor: its address and its first two strides."""
    return heads.data_ptr(), heads.stride(0), heads.stride(1)


def typed(values: Tensor) -> tuple[int, int]:
    """Return the `_MATRIX` of a tensor: its address and the code of its dtype (else KeyError)."""
    return values.data_ptr(), DTYPE_CODES[values.dtype]


@dataclass(frozen=True, slots=True)
class CpuLibrary:
    """The loaded library, and which of its instruction sets is in use."""

    path: Path
    isa: str
    functions: ctypes.CDLL
    #: Address of the table of this instruction set's functions.
    kernels: int
    #: For the operator: how it was found.
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Return the digest of the sources."""
        return _digest_of_sources()

    @property
    def multiplies_bfloat16(self) -> bool:
        """Return whether the CPU has instructions for products of bfloat16."""
        return self.isa in {"amx", "avx512_bf16", "neon_bf16"}

    @property
    def gains_by_byte_rows(self) -> bool:
        """Return whether products with rows of bytes are faster than those with 16-bit rows.

        AMX multiplies two digits in less time than vectors multiply one; on Arm nothing is
        measured.
        """
        return self.isa in {"avx512_bf16", "avx512_vnni", "avx2_vnni"}


def load_cpu_library(
    *, isa: str | None = None, environ: Mapping[str, str] | None = None
) -> CpuLibrary | str:
    """Load the compiled operations, building them if needed, or return in one line why not.

    In this order: the file that `OCTAVO_CPU_OPS` names; `_cpu_ops.so` beside this file (a container
    has no compiler); the build of an earlier start under `octavo_home()`; a new build there.
    `isa`, else `OCTAVO_CPU_ISA`, requests an instruction set other than the best.
    """
    variables = os.environ if environ is None else environ
    isa = isa or variables.get("OCTAVO_CPU_ISA")
    if named := variables.get("OCTAVO_CPU_OPS"):
        return _load(Path(named), isa)
    shipped = Path(__file__).with_name("_cpu_ops.so")
    return _load(shipped, isa) if shipped.exists() else _load_cached(variables, isa)


def _load(path: Path, isa: str | None, notes: tuple[str, ...] = ()) -> CpuLibrary | str:
    try:
        if not _is_whole(path):
            return f"{path} is damaged; build it anew with python -m model.cpu.ops"
        if other := _other_machine(path):
            return f"{path} was built for {other}, and this CPU is {platform.machine()}"
        _share_openmp()
        functions = ctypes.CDLL(str(path.resolve()))
        for name, (result, parameters) in _SIGNATURES.items():
            function = getattr(functions, name)
            function.restype, function.argtypes = result, parameters
    except (OSError, AttributeError) as error:
        return f"{path} cannot be loaded: {error}"
    if functions.octavo_sources().decode() != _digest_of_sources():
        return f"{path} was built from other sources; build it anew with python -m model.cpu.ops"
    usable = [name for name in ISAS if functions.octavo_supports(name.encode())]
    if (isa or not usable) and isa not in usable:
        return f"instruction set {isa!r} is not one of {', '.join(ISAS)}, or not this CPU's"
    isa = isa or usable[0]
    return CpuLibrary(path, isa, functions, functions.octavo_kernels(isa.encode()), notes)


def _share_openmp() -> None:
    """Make torch's OpenMP runtime visible to the library, which is linked against none.

    On x86 it is visible; torch's builds for Arm load it for themselves alone.
    """
    if hasattr(ctypes.CDLL(None), "omp_get_thread_num"):
        return
    runtime = openmp_runtime(Path("/proc/self/maps").read_text())
    if runtime:
        # It is loaded already: this only adds its symbols to those of the process.
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)


def openmp_runtime(maps: str) -> str:
    """Return the path of the OpenMP runtime in the memory map of a process; empty without one."""
    columns = (line.split(maxsplit=5) for line in maps.splitlines())
    paths = (line[5] for line in columns if len(line) > 5)
    return next((path for path in paths if Path(path).name.startswith(_OPENMP_NAMES)), "")


def _is_whole(path: Path) -> bool:
    """Compare a library with its checksum, since the loader runs damaged code, too.

    Raises `OSError` if it cannot be read.
    """
    content = path.read_bytes()
    return hashlib.sha256(content[:-_CHECKSUM_BYTES]).digest() == content[-_CHECKSUM_BYTES:]


def _other_machine(path: Path) -> str:
    """Return the architecture of a library if it is not this machine's; the loader has no message.

    A number of the ELF header stands for it.
    """
    with path.open("rb") as file:
        header = file.read(20)
    built_for = _ELF_MACHINES.get(int.from_bytes(header[18:20], "little"), "")
    return built_for if built_for != platform.machine() else ""


# ---- building ------------------------------------------------------------------------------------


def build(output: Path, compiler: str | None = None, isas: tuple[str, ...] = ISAS) -> str | None:
    """Compile the library to `output`, atomically; return why it could not be, or None.

    With all instruction sets the result runs on any CPU of this machine's architecture.
    """
    if sys.byteorder != "little":
        return f"the compiled CPU operations are for little-endian CPUs, not {platform.machine()}"
    compiler = compiler or _find_compiler(os.environ)
    if compiler is None:
        return "no C++ compiler found"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=_BUILD_PREFIX) as folder:
            linked = Path(folder) / output.name
            _compile(compiler, Path(folder), linked, isas)
            # The system's loader ignores bytes after the sections.
            content = linked.read_bytes()
            linked.write_bytes(content + hashlib.sha256(content).digest())
            linked.chmod(0o755)
            linked.replace(output)
    except subprocess.CalledProcessError as error:
        return f"the C++ compiler failed: {_first_error(error.stderr)}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the build failed: {error}"
    return None


def _compile(compiler: str, folder: Path, output: Path, isas: tuple[str, ...]) -> None:
    has = (f"-DOCTAVO_HAS_{isa.upper()}" for isa in isas)
    flags = (*BASE_FLAGS, f'-DOCTAVO_SOURCES="{_digest_of_sources()}"', *has)
    commands = [
        [compiler, *flags, "-fopenmp", "-c", str(SOURCES / name)]
        for name in ("octavo_cpu.cpp", "attention.cpp", "desks.cpp", "decoder.cpp", "packing.cpp")
    ]
    for isa in isas:
        kernels = ["-c", str(SOURCES / "kernels.cpp"), f"-DOCTAVO_ISA={isa}"]
        commands.append([compiler, *flags, *ISA_FLAGS[isa], *kernels])
    objects = [str(folder / f"{i}.o") for i in range(len(commands))]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for job in [
            pool.submit(_run, [*command, "-o", to])
            for command, to in zip(commands, objects, strict=True)
        ]:
            job.result()
    # Without -fopenmp: its symbols come from the runtime that torch has loaded already.
    _run([compiler, "-shared", "-o", str(output), *objects])


def _run(command: list[str]) -> None:
    subprocess.run(  # noqa: S603 - the operator's compiler on our own sources
        command, check=True, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S
    )


def _first_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")


# ---- the builds of earlier starts ----------------------------------------------------------------


def _load_cached(variables: Mapping[str, str], isa: str | None) -> CpuLibrary | str:
    """Load this machine's build of these sources, or build it now if none can be trusted."""
    # A build for this CPU alone takes a fraction of the time that all instruction sets take.
    isas = (isa,) if isa in ISAS else best_isas(platform.machine(), cpu_features())
    # The flags follow from two files and the architecture. The compiler is not part of the key:
    # without one, an earlier build stays in use.
    key = hashlib.sha256(f"{_digest_of_sources()} {platform.machine()} {isas}".encode())
    for file in (__file__, instruction_sets.__file__):
        key.update(Path(file).read_bytes())
    builds = octavo_home(variables) / "build"
    library = builds / key.hexdigest()[:16] / "cpu_ops.so"
    fault = _fault_of(library)
    if fault is None:
        return _load(library, isa)
    found = f"{fault}, and " if fault else ""
    compiler = _find_compiler(variables)
    if compiler is None:
        return f"{found}no C++ compiler found"
    try:
        with _locked(library.parent):
            # The previous holder of the lock may have built it.
            is_built = _fault_of(library) is None
            reason = None if is_built else _rebuild(library, compiler, isas)
    except OSError as error:
        return f"{found}the build folder cannot be used: {error}"
    _clear_abandoned(builds)
    if reason is not None:
        return found + reason
    return _load(
        library, isa, (f"{fault}: the compiled CPU operations were built anew",) * bool(fault)
    )


def _fault_of(library: Path) -> str | None:
    """Return why a build must not be loaded: None if it may be, empty if there is none."""
    try:
        for path in (library.parent, library):
            status = path.lstat()
            if status.st_uid not in {0, os.geteuid()}:
                return f"{path} belongs to another user"
            if status.st_mode & _WRITABLE_BY_OTHERS:
                return f"{path} can be written by other users"
        # Reading a pipe or a device might never end.
        return None if library.is_file() and _is_whole(library) else f"{library} is damaged"
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        return f"{library} cannot be read ({error.strerror})"


def _rebuild(library: Path, compiler: str, isas: tuple[str, ...]) -> str | None:
    if library.is_dir() and not library.is_symlink():
        shutil.rmtree(library)
    return build(library, compiler, isas)


def _clear_abandoned(builds: Path) -> None:
    """Remove the files of killed builds, of other versions too."""
    for abandoned in builds.glob(f"*/{_BUILD_PREFIX}*"):
        # A running build holds the lock; files of other users are theirs to remove.
        with suppress(OSError), (abandoned.parent / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(abandoned)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes, and make it writable for this user alone."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    status = folder.lstat()
    if status.st_uid not in {0, os.geteuid()}:
        raise PermissionError("set OCTAVO_HOME to a folder of your own")
    if status.st_mode & _WRITABLE_BY_OTHERS:
        folder.chmod(0o755)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- the inputs of a build -----------------------------------------------------------------------


def _find_compiler(variables: Mapping[str, str]) -> str | None:
    names = [variables["CXX"]] if variables.get("CXX") else ["g++", "c++"]
    found = (shutil.which(name, path=variables.get("PATH", "")) for name in names)
    return next((path for path in found if path), None)


def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in {".cpp", ".h"}:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
