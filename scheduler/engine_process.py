"""One engine's process and the channel to it, from its start to its end.

Nothing here blocks the event loop. Starting a process takes a millisecond: it is spawned, and its
`Build` follows over the channel. The end of a process is polled.
Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from model.interface import ModelInfo
from scheduler.channel import Channel
from scheduler.client import EngineUnavailableError
from scheduler.engine_main import engine_main
from scheduler.messages import Build, Failed, FromEngine, Ready, Shutdown, ToEngine
from scheduler.shortage import is_shortage

_log = logging.getLogger(__name__)

#: Between two polls of an ending process.
_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Death:
    """How an engine's process ended."""

    reason: str
    #: Killed, and not by us.
    is_outside: bool
    #: For want of memory, processes or files, as far as known.
    is_shortage: bool


class EngineStartError(EngineUnavailableError):
    """No engine could be started; `is_shortage`: for want of memory, processes or files."""

    def __init__(self, message: str, *, is_shortage: bool) -> None:
        super().__init__(message)
        self.is_shortage = is_shortage


@dataclass(frozen=True, slots=True)
class SpawnedProcess:
    """A process that waits for the `Build` of its engine, and our end of its channel."""

    process: SpawnProcess
    end: socket.socket

    def discard(self) -> None:
        """End a process that no engine took. May be called in any case."""
        if self.end.fileno() != -1:
            self.end.close()
            self.process.kill()


def spawn(preload: Callable[[], None] | None = None) -> SpawnedProcess:
    """Start a process for an engine. It calls `preload` before it waits.

    Raises `EngineStartError`.
    """
    try:
        return _spawn(preload)
    except Exception as error:
        raise _start_error(error) from error


def _start_error(error: Exception) -> EngineStartError:
    message = f"the engine's process cannot be started: {error}"
    return EngineStartError(message, is_shortage=is_shortage(error))


def _spawn(preload: Callable[[], None] | None) -> SpawnedProcess:
    ours, theirs = socket.socketpair()
    try:
        with Connection(theirs.detach()) as pipe:
            process = multiprocessing.get_context("spawn").Process(
                target=engine_main, args=(pipe, preload), name="octavo-engine", daemon=True
            )
            process.start()
    except BaseException:
        # A process that has started ends because its pipe is closed.
        ours.close()
        raise
    return SpawnedProcess(process, ours)


class EngineProcess:
    """An engine that starts, works and ends.

    `receive` is called with each message after `Ready`; `lose` once, after the last.
    """

    def __init__(
        self,
        build: Build,
        receive: Callable[[FromEngine], None],
        lose: Callable[[], None],
        spawned: SpawnedProcess | None = None,
    ) -> None:
        """Start the engine, in `spawned` if given. Raises `EngineStartError`."""
        self._receive = receive
        self._lose = lose
        self._info: ModelInfo | None = None
        self._failed: Failed | None = None
        #: It has sent `Ready`, or no message can come from it any more.
        self._is_settled = asyncio.Event()
        self._was_killed = False
        #: None: the process has not ended.
        self.exit_code: int | None = None
        try:
            self._start(build, spawned or _spawn(None))
        except Exception as error:
            raise _start_error(error) from error

    def _start(self, build: Build, spawned: SpawnedProcess) -> None:
        self._process = spawned.process
        assert self._process.pid is not None, "a started process has an id"
        self.pid = self._process.pid
        self._channel = Channel(spawned.end, self._take, self._on_end)
        try:
            self._channel.send(build)
        except BaseException:
            # The process ends because its pipe is closed.
            self._channel.close()
            raise

    async def ready(self, timeout_s: float, stop_timeout_s: float) -> ModelInfo:
        """Wait until the model is built. Raises `EngineStartError`; the process is gone then."""
        message = ""
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_settled.wait()
        except TimeoutError:
            message = f"the engine was not ready {timeout_s:g} s after its start"
            self.kill()
        if self._info is not None:
            return self._info
        death = await self.end(stop_timeout_s)
        if not message and self._failed:
            message = self._failed.message
        raise EngineStartError(
            message or f"the engine died while it started, {death.reason}",
            is_shortage=death.is_shortage,
        )

    def send(self, message: ToEngine) -> None:
        """Send, as soon as the socket has room."""
        self._channel.send(message)

    def stop(self) -> None:
        """Send `Shutdown`; kill a process that does not read it."""
        self._channel.send(Shutdown())
        if not self._channel.is_drained:
            self.kill()

    def kill(self) -> None:
        """End it from outside."""
        if not self._has_ended():
            self._was_killed = True
            self._process.kill()

    async def end(self, timeout_s: float) -> Death:
        """Wait for the end of the process; kill it if that takes longer than `timeout_s`."""
        if not await self._ends_within(timeout_s):
            self.kill()
            if not await self._ends_within(timeout_s):
                _log.error("process %s of the engine cannot be killed; it is left alone", self.pid)
        self._channel.close()
        self._is_settled.set()
        is_outside = self.exit_code == -signal.SIGKILL and not self._was_killed
        reason = self._failed.message if self._failed else f"exit code {self.exit_code}"
        has_lacked = self._failed is not None and self._failed.is_shortage
        return Death(reason, is_outside, is_shortage=is_outside or has_lacked)

    async def _ends_within(self, timeout_s: float) -> bool:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + timeout_s
        while not self._has_ended() and loop.time() < until_s:  # noqa: ASYNC110 - it sets no event
            await asyncio.sleep(_POLL_S)
        return self._has_ended()

    def _has_ended(self) -> bool:
        if self.exit_code is None and self._process.exitcode is not None:
            self.exit_code = self._process.exitcode
            self._process.close()
        return self.exit_code is not None

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Ready):
            self._info = message.info
            self._is_settled.set()
        elif isinstance(message, Failed):
            self._failed = message
        else:
            self._receive(message)

    def _on_end(self) -> None:
        self._is_settled.set()
        self._lose()
