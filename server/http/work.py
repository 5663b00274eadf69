"""Conversions of long texts, beside the event loop: few at a time, none for a client that left.

Has threads of its own: the loop's are for those who watch over the engine. Nobody waits for them
when the program ends. Knows nothing of what is converted.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

ConvertedT = TypeVar("ConvertedT")
#: Raises where nobody waits for the result any more.
Check = Callable[[], None]

#: From here on a text is converted in a thread: to encode 10,000 characters takes about 3 ms.
LONG_CHARS = 10_000
#: From here on it takes seconds, and memory: such texts have places of their own.
HUGE_CHARS = 1 << 18
NUM_LONG, NUM_HUGE = 4, 2
#: Memory is given back once nothing huge has been converted for so long.
_TRIM_AFTER_S = 1.0


class AbandonedError(Exception):
    """Nobody waits for this conversion."""


class Workshop:
    """For one event loop. Callers get a place in the order they came."""

    def __init__(self) -> None:
        self._long, self._huge = asyncio.Semaphore(NUM_LONG), asyncio.Semaphore(NUM_HUGE)
        self._trimming: asyncio.TimerHandle | None = None

    async def run(self, convert: Callable[[Check], ConvertedT], length: int) -> ConvertedT:
        """Return what `convert` gives for a text of `length` characters (or tokens).

        A cancelled caller leaves at once, and `convert` at its next call of what it is given; its
        place is free then.
        """
        if length < LONG_CHARS:
            return convert(_go_on)
        is_huge = length >= HUGE_CHARS
        places = self._huge if is_huge else self._long
        await places.acquire()
        loop, is_over = asyncio.get_running_loop(), threading.Event()
        done: asyncio.Future[ConvertedT] = loop.create_future()

        def check() -> None:
            if is_over.is_set():
                raise AbandonedError

        def finish(tell: Callable[[], None]) -> None:
            places.release()
            if is_huge:
                self._trim_later(loop)
            if not done.done():
                tell()

        def work() -> None:
            try:
                result = convert(check)
            except BaseException as error:  # noqa: BLE001 - the caller's to handle
                tell: Callable[[], None] = partial(done.set_exception, error)
            else:
                tell = partial(done.set_result, result)
            with suppress(RuntimeError):  # the loop was closed meanwhile: the program ends
                loop.call_soon_threadsafe(finish, tell)

        threading.Thread(target=work, name="conversion", daemon=True).start()
        try:
            return await done
        finally:
            is_over.set()

    def _trim_later(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._trimming is not None:
            self._trimming.cancel()
        thread = threading.Thread(target=_give_memory_back, name="trim", daemon=True)
        self._trimming = loop.call_later(_TRIM_AFTER_S, thread.start)


def _go_on() -> None:
    """Do not stop: it takes no time."""


def _give_memory_back() -> None:
    """Return freed memory to the system, which glibc keeps otherwise."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
