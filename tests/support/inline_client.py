"""An engine in the same process, behind the interface of a client.

Steps block the event loop while they compute; with a fake model that is microseconds, and the
order of everything is deterministic.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable

from configs.schema import SchedulerSection
from model.interface import ModelInfo, ModelRunner, Vocabulary
from scheduler.cache_story import CacheStory
from scheduler.client import EngineFaultError, EngineUnavailableError, GenerateRequest, TokenOutput
from scheduler.engine import Engine
from scheduler.messages import (
    CacheCommand,
    Cancel,
    ExplainPrefix,
    Prepared,
    ResetCache,
    SetVocabulary,
    Submit,
)
from scheduler.stats import EngineStats
from scheduler.streams import Streams

_log = logging.getLogger(__name__)


class InlineClient:
    """See `EngineClient`."""

    def __init__(
        self, runner: ModelRunner, config: SchedulerSection, clock_s: Callable[[], float]
    ) -> None:
        self._runner = runner
        self._engine = Engine(runner, config, clock_s, self._post)
        self._streams = Streams()
        self._wakes = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def info(self) -> ModelInfo:
        """See `EngineClient`."""
        return self._runner.info

    @property
    def is_alive(self) -> bool:
        """See `EngineClient`."""
        return self._pump is not None and not self._pump.done()

    async def start(self) -> None:
        """See `EngineClient`."""
        self._loop = asyncio.get_running_loop()
        self._pump = asyncio.create_task(self._run())

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """See `EngineClient`."""
        self._send(SetVocabulary(vocabulary))

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        """See `EngineClient`."""
        if not self.is_alive:
            raise EngineUnavailableError("the engine is not running")
        return self._streams.generate(request, self._send)

    def _post(self, message: Prepared) -> None:
        """Bring a message from a thread of the runner's to the loop."""
        assert self._loop is not None, "nothing is prepared before the start"
        self._loop.call_soon_threadsafe(self._send, message)

    async def reset_cache(self) -> int:
        """See `EngineClient`."""
        return await self.change_cache(ResetCache())

    async def change_cache(self, command: CacheCommand) -> int:
        """See `EngineClient`."""
        if not self.is_alive:
            raise EngineUnavailableError("the engine is not running")
        return await self._streams.change_cache(command, self._send)

    async def explain_cache(self, command: ExplainPrefix) -> CacheStory:
        """See `EngineClient`."""
        if not self.is_alive:
            raise EngineUnavailableError("the engine is not running")
        return await self._streams.explain_cache(command, self._send)

    def _send(self, message: Submit | Cancel | SetVocabulary | CacheCommand | Prepared) -> None:
        self._engine.handle(message)
        self._wakes.set()

    async def _run(self) -> None:
        try:
            while True:
                await self._wakes.wait()
                self._wakes.clear()
                while self._engine.has_work:
                    result = self._engine.step()
                    self._streams.dispatch(result)
                    await asyncio.sleep(0)
        except Exception as fault:  # noqa: BLE001 - no stream may wait for ever
            _log.exception("the engine fails")
            self._streams.close(EngineFaultError, f"the engine failed: {fault}")

    def stats(self) -> EngineStats:
        """See `EngineClient`."""
        return self._streams.engine_stats

    def on_step(self, observer: Callable[[int], None]) -> None:
        """See `EngineClient`."""
        self._streams.on_step(observer)

    def check(self) -> None:
        """Assert every invariant of streams and engine."""
        self._streams.check()
        self._engine.check()

    async def close(self) -> None:
        """See `EngineClient`."""
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait([self._pump])
        self._streams.close(EngineUnavailableError, "the engine was closed")
        self._engine.close()
