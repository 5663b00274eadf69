"""The engine in a process of its own, over one duplex pipe; both ends of it.

Knows nothing of HTTP, of text or of what a runner is made of: `make_runner` is pickled into the
child, which alone imports torch. The child never runs asyncio; a thread drains its end of the pipe
so that the API never blocks on a busy engine.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TypeAlias

from configs.schema import SchedulerSection
from model.interface import ModelInfo, ModelRunner, Vocabulary
from scheduler.client import Delta, EngineFaultError, EngineUnavailableError, GenerateRequest
from scheduler.engine import Engine
from scheduler.messages import (
    Begun,
    EngineStats,
    Failed,
    FinishReason,
    FromEngine,
    Learn,
    Prepared,
    Ready,
    Shutdown,
    StepResult,
    ToEngine,
)
from scheduler.streams import Streams
from scheduler.watchdog import Watchdog

_log = logging.getLogger(__name__)

#: Engines one request may take down with it before it is blamed and ended.
_MAX_CRASHES_OF_A_REQUEST = 2
#: Engines in a row that died before they finished anything; then the daemon is not alive.
_MAX_FRUITLESS_RESTARTS = 3
_STOP_TIMEOUT_S = 10.0

MakeRunner = Callable[[], ModelRunner]
Inbox: TypeAlias = queue.SimpleQueue[ToEngine | Prepared]


# ---- in the engine's process ---------------------------------------------------------------------


def engine_main(pipe: Connection, make_runner: MakeRunner, config: SchedulerSection) -> None:
    """Build the model, say so, then serve the pipe until it closes or says `Shutdown`."""
    # A terminal's Ctrl-C reaches the whole group; when to stop is for the API to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    inbox: Inbox = queue.SimpleQueue()
    is_built = threading.Event()
    # Before the model is built: that may take minutes, and nobody may be left to want it.
    args = pipe, inbox, is_built
    threading.Thread(target=_drain, args=args, name="inbox", daemon=True).start()
    try:
        engine = Engine(runner := make_runner(), config, time.monotonic, inbox.put, pipe.send)
        is_built.set()
        # What is there now stays to the end: collections need not walk it between two tokens.
        gc.collect()
        gc.freeze()
        pipe.send(Ready(runner.info))
        _serve(engine, pipe, inbox)
    except (BrokenPipeError, ConnectionResetError):
        return  # The API is gone, and with it everybody who could want a token.
    except Exception as fault:
        _log.debug("the engine gives up", exc_info=True)
        pipe.send(Failed(f"{type(fault).__name__}: {fault}"))
        raise SystemExit(1) from fault
    engine.close()


def _serve(engine: Engine, pipe: Connection, inbox: Inbox) -> None:
    while True:
        # With nothing to do, sleep until a message comes; else only take what is there.
        is_idle = not engine.has_work
        while is_idle and inbox.empty() and engine.idle():
            pass
        while is_idle or not inbox.empty():
            message = inbox.get()
            if isinstance(message, Shutdown):
                return
            engine.handle(message)
            is_idle = False
        pipe.send(engine.step())


def _drain(pipe: Connection, inbox: Inbox, is_built: threading.Event) -> None:
    try:
        while True:
            inbox.put(pipe.recv())
    except (EOFError, OSError):
        if not is_built.is_set():
            # The main thread is deep in somebody's C++ and hears nothing.
            os._exit(1)
        inbox.put(Shutdown())


# ---- in the API's process ------------------------------------------------------------------------


class ProcessClient:
    """See `EngineClient`. An engine that dies is replaced, and its streams go on where they were.

    A token is a function of the tokens before it and of (seed, position), so a stream goes on as it
    would have, as far as arithmetic repeats itself: exactly with float32 weights but for the last
    bits, up to rounding with 16 bits and fewer. The reader sees a pause.
    """

    def __init__(
        self,
        make_runner: MakeRunner,
        config: SchedulerSection,
        *,
        stop_timeout_s: float = _STOP_TIMEOUT_S,
    ) -> None:
        self._make_runner = make_runner
        self._config = config
        #: How long an engine may take to end before it is killed.
        self._stop_timeout_s = stop_timeout_s
        self._streams = Streams()
        self._info: ModelInfo | None = None
        #: Sent to each engine that takes the place of another.
        self._vocabulary: Vocabulary | None = None
        self._pipe: Connection | None = None
        self._process: BaseProcess | None = None
        self._restart: asyncio.Task[None] | None = None
        self._num_fruitless = 0
        self._num_restarts = 0
        #: When the newest engine was started, and how long the last one took to be ready.
        self._start_began_s = 0.0
        self._start_took_s: float | None = None
        self._is_closing = False
        self._watchdog = Watchdog(config.engine_timeout_s, self._owes_a_step, self._kill_hung)
        self.on_lost: Callable[[], None] = lambda: None

    @property
    def info(self) -> ModelInfo:
        """See `EngineClient`."""
        if self._info is None:
            raise EngineUnavailableError("the engine has not started")
        return self._info

    @property
    def is_alive(self) -> bool:
        """See `EngineClient`."""
        return self._pipe is not None

    @property
    def num_restarts(self) -> int:
        """Engines that had to be replaced so far."""
        return self._num_restarts

    @property
    def engine_pid(self) -> int | None:
        """The process that holds the model, for its memory's sake."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """See `EngineClient`."""
        self._start_began_s = time.monotonic()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=engine_main,
            args=(theirs, self._make_runner, self._config),
            name="octavo-engine",
            daemon=True,
        )
        process.start()
        self._process = process
        theirs.close()
        try:
            first: FromEngine = await asyncio.to_thread(ours.recv)
        except (EOFError, OSError):
            await asyncio.to_thread(process.join, self._stop_timeout_s)
            message = f"the engine died while it started, exit code {process.exitcode}"
            raise EngineUnavailableError(message) from None
        if not isinstance(first, Ready):
            ours.close()
            message = first.message if isinstance(first, Failed) else f"unexpected {first!r}"
            raise EngineUnavailableError(message)
        self._info = first.info
        self._start_took_s = time.monotonic() - self._start_began_s
        self._watchdog.start()
        self._pipe = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._receive)
        # uvloop turns what it watches non-blocking, and a message larger than the socket's buffer
        # would then fail half sent. The engine's inbox is always drained, so no send blocks long.
        os.set_blocking(ours.fileno(), True)
        if self._vocabulary is not None:
            self._send(Learn(self._vocabulary))

    def learn(self, vocabulary: Vocabulary) -> None:
        """See `EngineClient`."""
        self._vocabulary = vocabulary
        self._send(Learn(vocabulary))

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """See `EngineClient`."""
        if not self.is_alive:
            message = "the engine is being restarted; try again in a moment"
            raise EngineUnavailableError(message, self._start_left_s())
        return self._streams.generate(request, self._send)

    def _start_left_s(self) -> float | None:
        """Guess when an engine in the making will be ready: as long after its start as the last."""
        if self._start_took_s is None:
            return None
        return max(0.0, self._start_took_s - (time.monotonic() - self._start_began_s))

    def _send(self, message: ToEngine) -> None:
        if self._pipe is None:
            return  # A restart submits anew whatever is still wanted.
        try:
            self._pipe.send(message)
        except OSError:
            # What it said last is still to be read, and then its end.
            self._receive()

    def _receive(self) -> None:
        try:
            while self._pipe is not None and self._pipe.poll():
                message: FromEngine = self._pipe.recv()
                self._watchdog.heard()
                if isinstance(message, StepResult):
                    if any(reason is not FinishReason.ERROR for _, reason, _ in message.finished):
                        self._num_fruitless = 0
                    self._streams.dispatch(message)
                elif isinstance(message, Begun):
                    self._streams.begin(message)
                else:
                    _log.error("the engine failed: %s", message)
        except (EOFError, OSError):
            self._lose()

    def _owes_a_step(self) -> bool:
        return self._pipe is not None and bool(self._streams.unfinished())

    def _kill_hung(self) -> None:
        """Make a hang a death, which is known how to deal with."""
        assert self._process is not None, "something is owed by nobody"
        _log.error("the engine said nothing for %g s; killing it", self._config.engine_timeout_s)
        self._process.kill()

    def _lose(self) -> None:
        """Note that the engine is gone, and see to another."""
        self._drop_pipe()
        self._streams.engine_stats = EngineStats()
        if self._is_closing:
            return
        _log.error("the engine died; %d streams wait for another", len(self._streams.unfinished()))
        for stream in self._streams.note_crash():
            if stream.num_crashes >= _MAX_CRASHES_OF_A_REQUEST:
                stream.fail(
                    EngineFaultError("the engine died of this request, or beside it, twice")
                )
        self._restart = asyncio.create_task(self._start_again())

    async def _start_again(self) -> None:
        await self._reap()
        while self._num_fruitless < _MAX_FRUITLESS_RESTARTS:
            self._num_fruitless += 1
            self._num_restarts += 1
            try:
                await self.start()
            except Exception as error:  # noqa: BLE001 - whatever it is, no stream may wait for ever
                _log.error("the engine did not come back: %s", error)
                continue
            for stream in self._streams.unfinished():
                self._send(stream.resumed())
            return
        self._streams.fail_all(EngineUnavailableError, "the engine died and did not come back")
        self.on_lost()

    def _drop_pipe(self) -> None:
        if self._pipe is not None:
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
            self._pipe.close()
            self._pipe = None

    async def _reap(self) -> None:
        if self._process is None:
            return
        await asyncio.to_thread(self._process.join, self._stop_timeout_s)
        if self._process.is_alive():
            self._process.kill()
            await asyncio.to_thread(self._process.join)

    def stats(self) -> EngineStats:
        """See `EngineClient`."""
        return self._streams.engine_stats

    def on_step(self, observer: Callable[[int], None]) -> None:
        """See `EngineClient`."""
        self._streams.on_step(observer)

    def check(self) -> None:
        """Assert every invariant on this side of the pipe."""
        self._streams.check()

    async def close(self) -> None:
        """See `EngineClient`."""
        self._is_closing = True
        self._watchdog.stop()
        if self._restart is not None:
            self._restart.cancel()
            await asyncio.wait([self._restart])
        if self._pipe is None and self._process is not None:
            # Dead, or building a model for nobody.
            self._process.kill()
        self._send(Shutdown())
        self._drop_pipe()
        await self._reap()
        self._streams.fail_all(EngineUnavailableError, "the engine was closed")
