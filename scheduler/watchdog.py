"""Notices that somebody who owes an answer has fallen silent.

Looks from a thread of its own: a hung engine stops reading its pipe, and then the event loop may be
stuck in a send. Knows nothing of engines.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

#: Looks within the timeout.
_NUM_LOOKS = 4


class Watchdog:
    """Calls `bite` once nothing was heard for `timeout_s` though something is owed.

    It is never early, and late by half of `timeout_s` at most. It bites again only after another
    such time. `is_owed` and `bite` are called from the watchdog's thread.
    """

    def __init__(
        self,
        timeout_s: float,
        is_owed: Callable[[], bool],
        bite: Callable[[], None],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._period_s = timeout_s / _NUM_LOOKS
        # What is owed since just after a look counts from that look.
        self._patience_s = timeout_s + self._period_s
        self._is_owed = is_owed
        self._bite = bite
        self._clock_s = clock_s
        self._heard_s = clock_s()
        self._stops = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look. Again is fine."""
        self.heard()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Look no more. Without a start it is fine, too."""
        self._stops.set()
        if self._thread is not None:
            self._thread.join()

    def heard(self) -> None:
        """Note a sign of life."""
        self._heard_s = self._clock_s()

    def look(self) -> None:
        """Bite, if it is time to."""
        now_s = self._clock_s()
        if not self._is_owed():
            self._heard_s = now_s
        elif now_s - self._heard_s >= self._patience_s:
            self._heard_s = now_s
            self._bite()

    def _run(self) -> None:
        while not self._stops.wait(self._period_s):
            self.look()
