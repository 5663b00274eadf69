"""The engine in a process of its own: the client that starts it, watches it and replaces it.

Knows nothing of HTTP, of text or of the parts of a runner: `make_runner` is pickled into the
child, which alone imports torch. No call here blocks the event loop, whatever state the engine is
in.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

from configs.kv_disk import KVDisk
from configs.schema import SchedulerSection
from model.interface import ModelInfo, ModelRunner, Vocabulary
from scheduler.cache_story import CacheStory
from scheduler.client import EngineUnavailableError, GenerateRequest, TokenOutput
from scheduler.engine_process import Death, EngineProcess, EngineStartError, SpawnedProcess
from scheduler.isolation import Isolation
from scheduler.messages import (
    Begun,
    Build,
    CacheCommand,
    Cancel,
    ExplainPrefix,
    FromEngine,
    Ping,
    ResetCache,
    SetVocabulary,
    StepResult,
    Submit,
)
from scheduler.stats import EngineStats
from scheduler.streams import Streams
from scheduler.watchdog import Watchdog

_log = logging.getLogger(__name__)

#: Consecutive engines without a token or a start, after which the daemon gives up. Engines that
#: lacked memory, processes or files do not count. Finding two requests that crash engines takes
#: fewer (`scheduler/isolation.py`).
_MAX_FRUITLESS = 8
_MAX_PAUSE_S = 30.0
_STOP_TIMEOUT_S = 5.0

MakeRunner = Callable[[], ModelRunner]


class ProcessClient:
    """See `EngineClient`. An engine that dies is replaced, and its streams go on where they were.

    A token is a function of the tokens before it and of (seed, position). So a stream goes on as it
    would have, up to rounding: the last bits with float32 weights, more with 16 bits and fewer.
    The reader notices a pause.
    """

    def __init__(
        self,
        make_runner: MakeRunner,
        config: SchedulerSection,
        *,
        prepare: Callable[[], None] | None = None,
        disk: KVDisk | None = None,
        spawned: SpawnedProcess | None = None,
        stop_timeout_s: float = _STOP_TIMEOUT_S,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`stop_timeout_s`: how long an engine may take to end before it is killed.

        `prepare` is called first in each engine's process (see `Build`). `disk`: its disk tier.
        `spawned`: the process of the first engine, if it runs already.
        """
        self._build = Build(make_runner, config, prepare, disk)
        self._spawned = spawned
        self._config = config
        self._stop_timeout_s = stop_timeout_s
        self._sleep = sleep
        self._streams = Streams()
        self._isolation = Isolation(self._streams, self._send)
        self._watchdog = Watchdog(
            config.engine_timeout_s, lambda: self._send(Ping()), self._kill_hung
        )
        self._info: ModelInfo | None = None
        #: Sent to each engine that takes the place of another.
        self._vocabulary: Vocabulary | None = None
        #: The newest engine, and whether it takes requests.
        self._engine: EngineProcess | None = None
        self._is_serving = False
        self._is_lost = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        #: See `_MAX_FRUITLESS`; and the same with the engines that lacked resources.
        self._num_fruitless = 0
        self._num_setbacks = 0
        #: Engines that had to be replaced so far.
        self.num_restarts = 0
        #: When the newest engine was started or the next one will be, and how long the last one
        #: took to be ready.
        self._start_began_s = 0.0
        self._start_took_s: float | None = None
        self.on_lost: Callable[[], None] = lambda: None

    @property
    def info(self) -> ModelInfo:
        """See `EngineClient`."""
        if self._info is None:
            raise EngineUnavailableError("the engine has not started")
        return self._info

    @property
    def is_alive(self) -> bool:
        """See `EngineClient`. False while an answer of the engine is overdue."""
        return self._is_serving and not self._watchdog.is_silent

    @property
    def engine_pid(self) -> int | None:
        """The process that holds the model."""
        return self._engine.pid if self._engine else None

    # ---- requests --------------------------------------------------------------------------------

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """See `EngineClient`."""
        self._vocabulary = vocabulary
        self._send(SetVocabulary(vocabulary))

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        """See `EngineClient`."""
        if not self._is_serving:
            message = "the engine is being restarted; try again in a moment"
            raise EngineUnavailableError(message, self._start_left_s())
        return self._streams.generate(request, self._isolation.send)

    async def reset_cache(self) -> int:
        """See `EngineClient`."""
        return await self.change_cache(ResetCache())

    async def change_cache(self, command: CacheCommand) -> int:
        """See `EngineClient`."""
        if not self._is_serving:
            raise EngineUnavailableError("the engine is not running", self._start_left_s())
        return await self._streams.change_cache(command, self._send)

    async def explain_cache(self, command: ExplainPrefix) -> CacheStory:
        """See `EngineClient`."""
        if not self._is_serving:
            raise EngineUnavailableError("the engine is not running", self._start_left_s())
        return await self._streams.explain_cache(command, self._send)

    def _start_left_s(self) -> float | None:
        """Guess when an engine in the making will be ready: as long after its start as the last.

        One that is late by now will be as late again.
        """
        if self._start_took_s is None:
            return None
        return abs(self._start_took_s - (time.monotonic() - self._start_began_s))

    def _send(self, message: Submit | Cancel | SetVocabulary | CacheCommand | Ping) -> None:
        # The next engine gets all open requests again.
        if self._is_serving and self._engine is not None:
            self._engine.send(message)

    def _receive(self, message: FromEngine) -> None:
        self._watchdog.heard()
        if isinstance(message, StepResult):
            if message.request_ids or message.finished:
                self._num_fruitless = self._num_setbacks = 0
            self._streams.dispatch(message)
            self._isolation.advance()
        elif isinstance(message, Begun):
            self._isolation.note_begun(message)
        else:
            # It has run for long enough to be pinged.
            self._num_fruitless = self._num_setbacks = 0

    # ---- the engine's life -----------------------------------------------------------------------

    async def start(self) -> None:
        """See `EngineClient`."""
        await self._bring_up()
        self._supervisor = asyncio.create_task(self._supervise())

    async def _bring_up(self) -> None:
        """Start an engine and submit all open requests. Raises `EngineStartError`."""
        self._start_began_s = time.monotonic()
        spawned, self._spawned = self._spawned, None
        engine = EngineProcess(self._build, self._receive, self._lose, spawned)
        self._engine = engine
        self._info = await engine.ready(self._config.engine_start_timeout_s, self._stop_timeout_s)
        self._start_took_s = time.monotonic() - self._start_began_s
        self._is_serving = True
        self._watchdog.start()
        if self._vocabulary is not None:
            self._send(SetVocabulary(self._vocabulary))
        self._isolation.begin()

    def _kill_hung(self) -> None:
        """Kill a hung engine, so that a hang is handled as a death."""
        assert self._engine is not None, "the watchdog runs without an engine"
        _log.error("the engine said nothing for %g s; killing it", self._config.engine_timeout_s)
        self._engine.kill()
        self._lose()

    def _lose(self) -> None:
        """Note that the engine will send no more messages."""
        if self._is_serving:
            self._is_serving = False
            self._watchdog.stop()
            self._isolation.end()
            self._streams.fail_commands("the engine ended before it had changed its cache")
            self._is_lost.set()

    async def _supervise(self) -> None:
        """Replace each lost engine, until `_MAX_FRUITLESS` in a row have failed."""
        try:
            while self._num_fruitless < _MAX_FRUITLESS:
                await self._is_lost.wait()
                self._is_lost.clear()
                assert self._engine is not None, "an engine is lost before the first start"
                pause_s = self._note_death(await self._engine.end(self._stop_timeout_s))
                await self._start_again(pause_s)
        except Exception:  # noqa: BLE001 - no stream may wait for ever
            _log.exception("the engine cannot be replaced")
        self._is_serving = False
        self._streams.close(EngineUnavailableError, "the engine died and did not come back")
        self.on_lost()

    def _note_death(self, death: Death) -> float:
        """Count a death; return how long to wait before the next start."""
        num_waiting = len(self._streams.unfinished())
        _log.error("the engine died (%s); %d streams wait for another", death.reason, num_waiting)
        self._streams.engine_stats = EngineStats()
        self._isolation.judge(is_outside=death.is_outside)
        self.num_restarts += 1
        pause_s = self._count_setback(is_shortage=death.is_shortage)
        return pause_s if death.is_shortage else 0.0

    async def _start_again(self, pause_s: float) -> None:
        while self._num_fruitless < _MAX_FRUITLESS:
            if pause_s > 0:
                _log.warning("the next engine is started in %g s", pause_s)
                self._start_began_s = time.monotonic() + pause_s
                await self._sleep(pause_s)
            try:
                await self._bring_up()
            except EngineStartError as error:
                _log.error("the engine did not come back: %s", error)
                pause_s = self._count_setback(is_shortage=error.is_shortage)
            else:
                return

    def _count_setback(self, *, is_shortage: bool) -> float:
        """Count a failed start or a death; return how long to wait before the next start.

        Shortages are not limited: the machine may recover.
        """
        self._num_setbacks += 1
        self._num_fruitless += not is_shortage
        if self._num_setbacks == 1:
            return 0.0
        return min(_MAX_PAUSE_S, 2.0 ** (self._num_setbacks - 2))

    def stats(self) -> EngineStats:
        """See `EngineClient`."""
        return self._streams.engine_stats

    def on_step(self, observer: Callable[[int], None]) -> None:
        """See `EngineClient`."""
        self._streams.on_step(observer)

    def check(self) -> None:
        """Assert every invariant on this side of the channel."""
        self._streams.check()
        self._isolation.check()

    async def close(self) -> None:
        """See `EngineClient`. Within twice the stop timeout, whatever state the engine is in."""
        self._watchdog.stop()
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
        if self._engine is not None:
            if self.is_alive:
                self._engine.stop()
            else:
                # Dead, hung or still building its model.
                self._engine.kill()
            self._is_serving = False
            await self._engine.end(self._stop_timeout_s)
        self._streams.close(EngineUnavailableError, "the engine was closed")
