"""Notices a peer that does not answer a ping.

Runs on the event loop and counts ticks, not seconds: a blocked loop or a sleeping machine must not
look like a silent peer. Knows nothing of engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

#: Ticks within the timeout.
_NUM_TICKS = 8
#: Silent ticks after which the peer is pinged, and after which its answer is overdue.
_PING_AFTER, _SILENT_AFTER = 2, 7


class Watchdog:
    """Calls `ping` after a while without a message, and `on_timeout` if no answer arrives.

    The peer has `timeout_s` to answer a ping, so `on_timeout` is called 1 to 1.25 times as long
    after the last message. `is_silent` is true before the timeout is over. After a timeout it
    starts anew.
    """

    def __init__(
        self, timeout_s: float, ping: Callable[[], None], on_timeout: Callable[[], None]
    ) -> None:
        self._period_s = timeout_s / _NUM_TICKS
        self._ping = ping
        self._on_timeout = on_timeout
        #: Ticks since the last message.
        self._num_silent = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_silent(self) -> bool:
        """Whether an answer is overdue."""
        return self._num_silent >= _SILENT_AFTER

    def start(self) -> None:
        """Begin to count, on the running loop."""
        self.stop()
        self.heard()
        self._wait()

    def stop(self) -> None:
        """Stop. May be called without a start."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def heard(self) -> None:
        """Note a sign of life."""
        self._num_silent = 0

    def look(self) -> None:
        """Call `ping` or `on_timeout` when it is due."""
        self._num_silent += 1
        if self._num_silent == _PING_AFTER:
            self._ping()
        elif self._num_silent == _PING_AFTER + _NUM_TICKS:
            self.heard()
            self._on_timeout()

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._period_s, self._run)

    def _run(self) -> None:
        self._wait()
        self.look()
