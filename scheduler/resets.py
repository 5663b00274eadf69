"""Callers that wait for the engine to forget cached prefixes, answered in the order they came.

Knows nothing of how messages travel. Everything here happens on one event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from scheduler.client import EngineUnavailableError
from scheduler.messages import ResetCache, StepResult


class CacheResets:
    """The resets of one client that are not answered yet."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[int]] = deque()

    async def ask(self, send: Callable[[ResetCache], None]) -> int:
        """Send a reset and return the number of freed pages. Raises `EngineUnavailableError`."""
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        send(ResetCache())
        return await answer

    def dispatch(self, result: StepResult) -> None:
        """Answer those whose reset the engine has done."""
        for num_pages in result.reset_pages[: len(self._waiting)]:
            # A caller that left cancelled it.
            with suppress(asyncio.InvalidStateError):
                self._waiting.popleft().set_result(num_pages)

    def fail(self, message: str) -> None:
        """Tell all who wait that there will be no answer."""
        while self._waiting:
            with suppress(asyncio.InvalidStateError):
                self._waiting.popleft().set_exception(EngineUnavailableError(message))
