"""The number of threads that compute a step while other processes use the same cores.

The threads of a step wait for each other several times a layer. Where another process takes turns
with one of them, all of them wait, and a team of n is slower than one of n - 1. The kernel counts
how long each thread was ready without a core; `TeamSize` decides by this count alone. `Team` is the
edge: it reads the count and sets the number, for our own operations and for torch's.

Results do not depend on the number of threads (tests/model/cpu/test_team.py). Products in float32
by oneDNN do, in their last bits; their number of threads stays.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

_log = logging.getLogger(__name__)

_TASKS = "/proc/self/task"
#: Computing time after which the waits are read: some turns of the kernel's scheduler.
_WINDOW_S = 0.1
#: A size is kept this long before a larger one is tried, doubled after each failure.
_MIN_PAUSE_S, _MAX_PAUSE_S = 1.0, 4.0
#: Contended windows in a row that the full team and a smaller one take: the kernel needs some time
#: to move a thread to a core that has become free.
_MAX_CONTENDED_FULL, _MAX_CONTENDED_SMALL = 2, 5
#: Of the time that a contended team gets, about so much is of use; in the rest its threads wait for
#: each other. Measured: 0.65 with one of two cores contended, 0.9 with both.
_USE_OF_CONTENDED_TIME = 0.6


class TeamSize:
    """The rule: the largest team that need not wait for cores, if any is worth it.

    Pure. All times are of computing; idle ones do not count.
    """

    def __init__(self, max_threads: int) -> None:
        self.max_threads = max_threads
        self.num_threads = max_threads
        #: A smaller team than this gets less done than the full, contended one.
        self._least = 1
        self._pause_s = _MIN_PAUSE_S
        #: Until a larger team is tried or, after a fruitless search, a smaller one.
        self._left_s = 0.0
        self._is_trial = False
        #: Windows in a row in which too many of this team waited.
        self._num_contended = 0

    def observe(self, computing_s: float, waiting_s: float) -> None:
        """Choose the next size, after a window in which all threads together waited so long."""
        self._left_s -= computing_s
        num_waiting = waiting_s / computing_s
        is_trial, self._is_trial = self._is_trial, False
        if num_waiting < _max_waiting(self.num_threads):
            self._num_contended = 0
            self._go_up(is_trial=is_trial)
            return
        self._num_contended += 1
        if is_trial:
            self._change_to(self.num_threads - 1)
            self._rest()
        elif self.num_threads == self.max_threads:
            if self._num_contended >= _MAX_CONTENDED_FULL and self._left_s <= 0:
                self._shrink(num_waiting)
        elif self._num_contended >= _MAX_CONTENDED_SMALL:
            self._search_on(num_waiting)

    def _go_up(self, *, is_trial: bool) -> None:
        if self.num_threads == self.max_threads:
            self._pause_s = _MIN_PAUSE_S
        elif is_trial or self._left_s <= 0:
            self._change_to(self.num_threads + 1)
            self._is_trial = True

    def _shrink(self, num_waiting: float) -> None:
        useful = (self.max_threads - num_waiting) * _USE_OF_CONTENDED_TIME
        self._least = max(1, math.ceil(useful))
        self._left_s = self._pause_s
        self._search_on(num_waiting)

    def _search_on(self, num_waiting: float) -> None:
        if self.num_threads > self._least:
            num_fewer = max(1, round(num_waiting))
            self._change_to(max(self._least, self.num_threads - num_fewer))
        elif self.num_threads < self.max_threads:
            # All cores are contended alike: the full team has the largest share of them.
            self._change_to(self.max_threads)
            self._rest()

    def _change_to(self, num_threads: int) -> None:
        self._num_contended = 0
        self.num_threads = num_threads

    def _rest(self) -> None:
        self._pause_s = min(2 * self._pause_s, _MAX_PAUSE_S)
        self._left_s = self._pause_s

    def check(self) -> None:
        """Assert that the size and the times are within their bounds."""
        assert 1 <= self.num_threads <= self.max_threads, "a team of no size"
        assert 1 <= self._least <= self.max_threads, "no team is large enough"
        assert _MIN_PAUSE_S <= self._pause_s <= _MAX_PAUSE_S, "a pause out of its bounds"


def _max_waiting(num_threads: int) -> float:
    """Return how many threads may wait on average: about the cost of one thread fewer.

    A lone thread that waits half of its time shares its core with another process.
    """
    return min(0.4, max(0.1, 0.8 / num_threads))


class Team:
    """The threads of this process's steps: at most `max_threads`, fewer while others need cores."""

    def __init__(
        self,
        max_threads: int,
        waits_s: Callable[[], dict[str, float]] | None = None,
        set_num_threads: Callable[[int], None] = torch.set_num_threads,
    ) -> None:
        """`waits_s`: how long each thread has waited for a core so far, by its name."""
        self._size = TeamSize(max_threads)
        self._waits_s = waits_s or read_waits_s
        self._set_num_threads = set_num_threads
        self._computing_s = 0.0
        self._is_logged = False
        self._before_s = self._waits_s()

    def observe(self, computing_s: float) -> None:
        """Take in the time of one step; between two steps the number of threads may change."""
        self._computing_s += computing_s
        if self._computing_s < _WINDOW_S or not self._before_s:
            return
        waits_s, before_s = self._waits_s(), self._before_s
        waiting_s = sum(wait_s - before_s.get(name, 0.0) for name, wait_s in waits_s.items())
        before = self._size.num_threads
        self._size.observe(self._computing_s, waiting_s)
        self._before_s, self._computing_s = waits_s, 0.0
        if (num_threads := self._size.num_threads) != before:
            self._set_num_threads(num_threads)
            self._log(num_threads)

    def _log(self, num_threads: int) -> None:
        # Once is enough for an operator: a busy neighbour may come and go for days.
        level = logging.DEBUG if self._is_logged else logging.INFO
        self._is_logged = True
        message = "%d of %d threads compute while other processes use the cores"
        _log.log(level, message, num_threads, self._size.max_threads)


def read_waits_s(tasks: str = _TASKS) -> dict[str, float]:
    """Read how long each thread has been ready without a core; empty where it is not counted."""
    waits_s: dict[str, float] = {}
    with suppress(OSError):
        for thread in os.listdir(tasks):  # noqa: PTH208 - no object a thread, ten times a second
            # It may have ended meanwhile.
            with suppress(OSError, ValueError, IndexError):
                text = Path(tasks, thread, "schedstat").read_text(encoding="ascii")
                waits_s[thread] = int(text.split()[1]) / 1e9
    return waits_s
