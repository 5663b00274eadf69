"""Notices a peer that does not answer a ping.

Runs on the event loop and counts ticks, not seconds: a blocked loop or a sleeping machine must not
look like a silent peer. Knows nothing of engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

#: Ticks within the timeout.
_NUM_LOOKS = 8
#: Looks of silence after which it asks, and after which it says that nothing is to be expected.
_ASKS_AFTER, _DOUBTS_AFTER = 2, 7


class Watchdog:
<<<<<<< tmpmoves
    """Calls `ask` after a silence, and `on_timeout` if there is no answer.
=======
    """Calls `ask` after a while without a message, and `on_timeout` if no answer arrives.
>>>>>>> m-engine

    The peer has `timeout_s` to answer a ping, so `on_timeout` is called 1 to 1.25 times as long
    after the last message. `is_silent` is true before the timeout is over. After a timeout it
    starts anew.
    """

    def __init__(
        self, timeout_s: float, ask: Callable[[], None], on_timeout: Callable[[], None]
    ) -> None:
        self._period_s = timeout_s / _NUM_LOOKS
        self._ask = ask
        self._on_timeout = on_timeout
        #: Ticks since the last message.
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
        """Ask or call `on_timeout`, if it is time to."""
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
