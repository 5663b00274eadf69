"""Notices that somebody who is asked for a sign of life gives none.

Looks from the event loop and counts looks, not seconds: a loop that stood still, or a machine that
slept, has not waited. Knows nothing of engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

#: Looks within the timeout.
_NUM_LOOKS = 8
#: Looks of silence after which it asks, and after which it says that nothing is to be expected.
_ASKS_AFTER, _DOUBTS_AFTER = 2, 7


class Watchdog:
    """Calls `ask` after a silence, and `on_timeout` if there is no answer.

    An answer may take `timeout_s`, so `on_timeout` is called between 1 and 1.25 times as long after
    the last sign of life. `is_silent` is true before the timeout is over. Then it starts again.
    """

    def __init__(
        self, timeout_s: float, ask: Callable[[], None], on_timeout: Callable[[], None]
    ) -> None:
        self._period_s = timeout_s / _NUM_LOOKS
        self._ask = ask
        self._on_timeout = on_timeout
        #: Looks since something was heard.
        self._num_silent = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_silent(self) -> bool:
        """Whether an answer is overdue."""
        return self._num_silent >= _DOUBTS_AFTER

    def start(self) -> None:
        """Begin to look, from the running loop."""
        self.stop()
        self.heard()
        self._wait()

    def stop(self) -> None:
        """Look no more. Without a start it is fine, too."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def heard(self) -> None:
        """Note a sign of life."""
        self._num_silent = 0

    def look(self) -> None:
        """Call `ask` or `on_timeout` when it is due."""
        self._num_silent += 1
        if self._num_silent == _ASKS_AFTER:
            self._ask()
        elif self._num_silent == _ASKS_AFTER + _NUM_LOOKS:
            self.heard()
            self._on_timeout()

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._period_s, self._run)

    def _run(self) -> None:
        self._wait()
        self.look()
