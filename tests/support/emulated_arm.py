"""The compiled CPU operations of 64-bit Arm CPUs, in an emulator where this machine is another one.

They are compiled as a native build compiles them, with the driver in tests/model/cpu/arm64, and run
by qemu-aarch64. Tensors are copied to the driver and back.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from model.cpu.instruction_sets import ISA_FLAGS, ISAS_OF
from model.cpu.library import BASE_FLAGS, SOURCES
from model.weights.tiles import Tiles
from waiting import TIMEOUT_S

ISAS = ISAS_OF["aarch64"]
NEON_ISAS = ISAS[:-1]
#: The least CPU of each instruction set that the emulator has: an instruction beyond it is a fault.
CPUS = {
    "scalar": "cortex-a72",
    "neon": "cortex-a72",
    "neon_dotprod": "neoverse-n1",
    "neon_bf16": "max",
}
_COMPILER, _EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
_DRIVER = Path(__file__).parents[1] / "model/cpu/arm64/driver.cpp"
_LINE_BYTES = 64
# `T t = {first};` sets the other members to zero.
_WARNINGS = ("-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Werror")


def why_not() -> str:
    """Return which program is missing; empty if none is."""
    missing = [name for name in (_COMPILER, _EMULATOR) if shutil.which(name) is None]
    needs = "apt-get install g++-aarch64-linux-gnu qemu-user"
    return f"{' and '.join(missing)} not found: {needs}" if missing else ""


def build(folder: Path, isas: Sequence[str]) -> Path:
    """Compile the driver with some instruction sets, unless `folder` has it; return its path."""
    flags = [*BASE_FLAGS, *_WARNINGS, f"-I{SOURCES}"]
    has = [f"-DOCTAVO_HAS_{isa.upper()}" for isa in isas]
    commands = [[*flags, *has, "-fopenmp", '-DOCTAVO_SOURCES=""', str(_DRIVER)]]
    kernels = str(SOURCES / "kernels.cpp")
    commands += [[*flags, *ISA_FLAGS[isa], f"-DOCTAVO_ISA={isa}", kernels] for isa in isas]
    digest = hashlib.sha256(repr(commands).encode() + _DRIVER.read_bytes())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    program = folder / digest.hexdigest()[:16]
    with (folder / "lock").open("w") as lock:
        # Several test processes need it at the same time.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            _link(program, commands)
    return program


def _link(program: Path, commands: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory(dir=program.parent) as temporary:
        objects = [f"{temporary}/{i}.o" for i in range(len(commands))]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(_compile, [[*one, "-c"] for one in commands], objects))
        # Static: the emulator needs no libraries of the other architecture.
        _compile(["-static", "-fopenmp", *objects], f"{temporary}/linked")
        Path(temporary, "linked").rename(program)


def _compile(arguments: list[str], output: str) -> None:
    command = [_COMPILER, *arguments, "-o", output]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr


class EmulatedArm:
    """A running driver, and the instruction set that it computes with."""

    def __init__(self, process: subprocess.Popen[bytes], isa: str) -> None:
        self._process = process
        self.isa = isa
        self.kernels = self.call("octavo_kernels", isa.encode())

    def call(self, name: str, *arguments: float | bytes | Tensor | None) -> int:
        """Call a function of csrc; tensors and bytes are copied, and stay in the driver."""
        words = b"".join(map(self._word, arguments))
        self._send("call", len(arguments), 0, name.encode().ljust(32, b"\0") + words)
        return self._number()

    def put(self, values: Tensor) -> int:
        """Copy a tensor to the driver; return its address there."""
        return self._put(values.contiguous().view(torch.uint8).numpy().tobytes())

    def put_weights(self, tiles: Tiles, activation_bits: int = 16) -> Tensor:
        """Copy packed weights; return the numbers of csrc/kernels.h's `Weights`."""
        parts = (tiles.weight, tiles.scales, tiles.minimums, tiles.bias)
        addresses = [0 if part is None else self.put(part) for part in parts]
        return torch.tensor([*addresses, *tiles.description[len(parts) :], activation_bits])

    def get(self, address: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Copy a tensor from the driver."""
        found = torch.empty(shape, dtype=dtype)
        self._send("read", address, found.nbytes)
        content = self._receive(found.nbytes)
        return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)

    def supports(self, isa: str) -> bool:
        """Return whether the emulated CPU has an instruction set."""
        return bool(self.call("octavo_supports", isa.encode()))

    def _word(self, argument: float | bytes | Tensor | None) -> bytes:
        if isinstance(argument, Tensor):
            argument = self.put(argument)
        elif isinstance(argument, bytes):
            argument = self._put(argument + b"\0")
        if argument is None or isinstance(argument, int):
            return struct.pack("<q", argument or 0)
        return struct.pack("<fi", argument, 0)

    def _put(self, content: bytes) -> int:
        self._send("alloc", -(-len(content) // _LINE_BYTES) * _LINE_BYTES, 0)
        address = self._number()
        self._send("write", address, len(content), content)
        return address

    def _send(self, command: str, first: int, second: int, more: bytes = b"") -> None:
        assert self._process.stdin is not None
        header = struct.pack("<8sqq", command.encode(), first, second)
        self._process.stdin.write(header + more)
        self._process.stdin.flush()

    def _number(self) -> int:
        number: int = struct.unpack("<q", self._receive(8))[0]
        return number

    def _receive(self, num_bytes: int) -> bytes:
        assert self._process.stdout is not None
        content = self._process.stdout.read(num_bytes)
        assert len(content) == num_bytes, f"the driver ended with {self._process.wait()}"
        return content


@contextmanager
def emulated(program: Path, isa: str, cpu: str | None = None) -> Iterator[EmulatedArm]:
    """Run a driver with an instruction set on the least CPU that has it, or on a given one."""
    command = [_EMULATOR, "-cpu", cpu or CPUS[isa], str(program)]
    # A thread that waits must not take a core of one that computes.
    variables = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables
    ) as process:
        try:
            yield EmulatedArm(process, isa)
        finally:
            process.kill()
