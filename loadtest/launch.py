"""Starts a server, measures the time until it serves, and stops it and its children."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shlex
import signal
import socket
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loadtest.target import Target, TargetError

if TYPE_CHECKING:
    import psutil

_POLL_S = 0.05
_STOP_TIMEOUT_S = 60.0
_TAIL_LINES = 12
_NOT_FOUND = 404


@dataclass(frozen=True, slots=True)
class Command:
    """How a server is started: words with `{port}` somewhere in them."""

    words: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Command:
        """Read a command line; no shell runs it. Raises `ValueError`."""
        if "{port}" not in text:
            raise ValueError(f"{text!r} must say where its {{port}} goes")
        return cls(tuple(shlex.split(text)))

    def for_port(self, port: int) -> list[str]:
        """Return the words to run."""
        return [word.replace("{port}", str(port)) for word in self.words]


@dataclass(frozen=True, slots=True)
class Started:
    """A server that runs until its context is left."""

    target: Target
    process: Process
    #: From its start until it served.
    ready_s: float

    def memory_bytes(self) -> int:
        """Return the memory of the process and its children; shared pages count once."""
        import psutil  # noqa: PLC0415 - `started` reports a missing one

        try:
            top = psutil.Process(self.process.pid)
            return sum(_memory_bytes(one) for one in (top, *top.children(recursive=True)))
        except psutil.NoSuchProcess:
            return 0


def _memory_bytes(process: psutil.Process) -> int:
    import psutil  # noqa: PLC0415 - as above

    with suppress(psutil.Error):
        full = process.memory_full_info()
        return int(getattr(full, "pss", 0) or full.rss)
    return 0


@asynccontextmanager
async def started(
    name: str, command: Command, api_key: str, log: Path, timeout_s: float
) -> AsyncIterator[Started]:
    """Start the server on a free port and yield it once it serves. Raises `TargetError`."""
    if importlib.util.find_spec("psutil") is None:
        raise TargetError(
            "psutil, which reads the memory of servers that are started, is not installed: "
            "pip install 'octavo[loadtest]', in a checkout `make bench`"
        )
    port = _free_port()
    began_s = time.perf_counter()
    with log.open("ab") as output:
        try:
            process = await asyncio.create_subprocess_exec(
                *command.for_port(port), stdout=output, stderr=output, start_new_session=True
            )
        except OSError as error:
            raise TargetError(f"{name} cannot be started: {error}") from error
    target = Target(name, f"http://127.0.0.1:{port}", api_key)
    try:
        await _wait_ready(target, process, log, began_s + timeout_s)
        yield Started(target, process, time.perf_counter() - began_s)
    finally:
        target.close()
        await _stop(process)


async def _wait_ready(target: Target, process: Process, log: Path, until_s: float) -> None:
    while not await _is_ready(target):
        if process.returncode is not None:
            raise TargetError(
                f"{target.name} ended with {process.returncode} before it served:\n{_tail(log)}"
            )
        if time.perf_counter() > until_s:
            raise TargetError(f"{target.name} does not serve in time (--start-timeout); see {log}")
        await asyncio.sleep(_POLL_S)


async def _is_ready(target: Target) -> bool:
    """Return whether it is healthy, if it has that route, and lists a model."""
    try:
        status, _ = await target.get("/health")
        if status not in (200, _NOT_FOUND):
            return False
        await target.models()
    except TargetError:
        return False
    return True


async def _stop(process: Process) -> None:
    """End the whole group: a remaining process would run beside the next server."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
            break
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
