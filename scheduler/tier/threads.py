"""The threads beside a store: one writes pages, others read them into memory.

Nothing here is waited for by a step. Knows nothing of requests and of the cache.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from scheduler.tier.record import Buffer, PageKey
from scheduler.tier.store import DiskStore

_log = logging.getLogger("octavo.cache")

_LOWEST_PRIORITY = 19
#: After a failed write nothing is written for so long: a full disk does not empty itself.
_PAUSE_S = 30.0

_Task: TypeAlias = Callable[[], None] | None


@dataclass(slots=True, eq=False)
class Run:
    """Pages of one prompt that are read together, by one thread."""

    keys: list[PageKey]
    #: Called by the reading thread at the end, unless the run is dropped.
    notify: Callable[[], None]
    #: The contents up to the first page without a sound record; None: they are being read.
    pages: list[memoryview] | None = None
    is_dropped: bool = False


class Alarm:
    """A thread that calls once, after a time, unless it is cancelled before."""

    def __init__(self, delay_s: float, call: Callable[[], None]) -> None:
        self._timer = threading.Timer(delay_s, call)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        """Call no more. Nothing happens where it has called."""
        self._timer.cancel()


class Writer:
    """A thread that stores pages, in the order of `put`, while the processors are free."""

    def __init__(self, store: DiskStore, max_pages: int, clock_s: Callable[[], float]) -> None:
        self._store = store
        self._clock_s = clock_s
        self._room = threading.BoundedSemaphore(max_pages)
        self._tasks: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        self._resumes_s = -_PAUSE_S
        #: Pages whose write failed, or was not tried after one that did.
        self.num_dropped = 0
        self._thread = threading.Thread(target=self._work, name="store-pages", daemon=True)
        self._thread.start()

    def put(self, key: PageKey, contents: Buffer, timeout_s: float = 0.0) -> bool:
        """Queue a page; False where the queue is full for so long."""
        if not self._room.acquire(timeout=timeout_s):
            return False
        self._tasks.put(lambda: self._write(key, contents))
        return True

    def forget(self, keys: Iterable[PageKey]) -> None:
        """Delete pages, queued ones too."""
        forgotten = list(keys)
        self._store.forget(forgotten)
        self._tasks.put(lambda: self._store.forget(forgotten))

    def clear(self) -> None:
        """Delete all pages, queued ones too."""
        self._store.clear()
        self._tasks.put(self._store.clear)

    def close(self) -> None:
        """Store all that is queued, and close the store."""
        self._tasks.put(None)
        self._thread.join()
        self._store.close()

    def _write(self, key: PageKey, contents: Buffer) -> None:
        self._room.release()
        if self._clock_s() < self._resumes_s:
            self.num_dropped += 1
            return
        try:
            self._store.put(key, contents)
        except OSError as error:
            self.num_dropped += 1
            self._resumes_s = self._clock_s() + _PAUSE_S
            reason = error.strerror or error
            _log.warning("no page is stored for %g s: a write failed: %s", _PAUSE_S, reason)

    def _work(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        while (task := self._tasks.get()) is not None:
            task()


@dataclass(slots=True)
class Readers:
    """Threads that read runs of pages, the oldest first."""

    store: DiskStore
    num_threads: int = 2
    _runs: queue.SimpleQueue[Run | None] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        for number in range(self.num_threads):
            name = f"load-pages-{number}"
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def read(self, run: Run) -> None:
        """Queue a run."""
        self._runs.put(run)

    def close(self) -> None:
        """End the threads after the runs that they read now. One that hangs is not waited for."""
        for _ in range(self.num_threads):
            self._runs.put(None)

    def _work(self) -> None:
        while (run := self._runs.get()) is not None:
            pages = list[memoryview]()
            for key in run.keys:
                contents = None if run.is_dropped else self.store.get(key)
                if contents is None:
                    break
                pages.append(contents)
            run.pages = pages
            if not run.is_dropped:
                run.notify()
