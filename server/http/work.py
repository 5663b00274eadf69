"""Converts long texts beside the event loop: few at a time, none for a client that left.

It has its own threads: those of the loop are for the supervision of the engine. They are daemon
threads, so the program can end. Knows nothing of the conversions.
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
#: Raises if the result is not needed any more.
Check = Callable[[], None]

#: Texts from this length on are converted in a thread: encoding 10,000 characters takes 3 ms.
LONG_CHARS = 10_000
#: Texts from this length on take seconds, and memory: they have places of their own.
HUGE_CHARS = 1 << 18
NUM_LONG, NUM_HUGE = 4, 2
#: Memory is returned after this time without a huge conversion.
_TRIM_AFTER_S = 1.0


class AbandonedError(Exception):
    """The caller of this conversion was cancelled."""


class Workshop:
    """The conversions of one event loop. Callers get a place in order of arrival."""

    def __init__(self) -> None:
        self._long, self._huge = asyncio.Semaphore(NUM_LONG), asyncio.Semaphore(NUM_HUGE)
        self._trimming: asyncio.TimerHandle | None = None

    async def run(self, convert: Callable[[Check], ConvertedT], length: int) -> ConvertedT:
        """Return the result of `convert` for a text of `length` characters (or tokens).

        A cancelled caller returns at once, and `convert` at its next call of its `Check`, which
        frees the place.
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

        def finish(report: Callable[[], None]) -> None:
            places.release()
            if is_huge:
                self._trim_later(loop)
            if not done.done():
                report()

        def work() -> None:
            try:
                result = convert(check)
            except BaseException as error:  # noqa: BLE001 - the caller's to handle
                report: Callable[[], None] = partial(done.set_exception, error)
            else:
                report = partial(done.set_result, result)
            with suppress(RuntimeError):  # the loop was closed meanwhile: the program ends
                loop.call_soon_threadsafe(finish, report)

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
    """Do nothing: a short conversion is never abandoned."""


def _give_memory_back() -> None:
    """Return freed memory to the system, which glibc keeps otherwise."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
