"""How fast the queue moves, so that a refused client is told when to come again, not a constant.

Knows nothing of HTTP or of why somebody is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from scheduler.client import EngineClient

#: What was measured so long ago counts half.
_HALF_LIFE_S = 10.0
#: No promise is shorter or longer: clients wait whole seconds, and OpenAI's no more than a minute.
LEAST_S, MOST_S = 1, 60


class QueuePace:
    """Prompt tokens let in a second, counted only while somebody waits."""

    def __init__(self, client: EngineClient, clock_s: Callable[[], float]) -> None:
        self._client = client
        self._clock_s = clock_s
        #: Tokens let in, and seconds in which somebody waited: both fade with those seconds.
        self._tokens = 0.0
        self._queued_s = 0.0
        self._last_s = 0.0
        self._last_admitted = 0
        self._has_waiting = False
        client.on_step(self._on_step)

    def _on_step(self, num_step_tokens: int) -> None:
        del num_step_tokens
        stats, now_s = self._client.stats(), self._clock_s()
        # The engine's counter of prompts looked up in the cache: each is, once, when it is let in.
        admitted = stats.prefix_queries_tokens_total
        if self._has_waiting:
            elapsed_s = now_s - self._last_s
            fades = 0.5 ** (elapsed_s / _HALF_LIFE_S)
            # A new engine counts from 0.
            num_new = max(0, admitted - self._last_admitted)
            self._tokens = self._tokens * fades + num_new
            self._queued_s = self._queued_s * fades + elapsed_s
        self._last_s, self._last_admitted = now_s, admitted
        self._has_waiting = stats.num_waiting > 0

    def retry_after_s(self) -> int:
        """Return in how many seconds those who wait now will be in, `LEAST_S` to `MOST_S`.

        Where nobody was let in yet: as long again as they have waited.
        """
        since_s = self._clock_s() - self._last_s if self._has_waiting else 0.0
        queued_s = self._queued_s + since_s
        num_waiting = self._client.stats().num_waiting_tokens
        left_s = num_waiting * queued_s / self._tokens if self._tokens else queued_s
        # Milliseconds are noise, and not worth a second more.
        return min(MOST_S, max(LEAST_S, math.ceil(round(left_s, 3))))
