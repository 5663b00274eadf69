"""Who may wait in a queue that is full, and when the others are told to come again.

A refused client is promised a place: the next one that the queue, at its measured pace, will have
and that nobody before it was promised. Until then places are kept for those who were promised one.
Knows nothing of HTTP; that the engine refuses is for the engine to say.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable

from configs.schema import SchedulerSection
from scheduler.client import EngineClient

#: What was measured so long ago counts half.
_HALF_LIFE_S = 20.0
#: No promise is shorter or longer: clients wait whole seconds, and OpenAI's no more than a minute.
#: Who would have to wait longer is told the most, and promised nothing.
LEAST_S, MOST_S = 1, 60
#: Requests that are thought to have been let in, one a second, before anything was measured.
_NUM_GUESSED = 5
#: Answers differ in length: a promise leaves so much more time than the places come in.
_MARGIN = 1.25
#: Behind its time a promise is kept for so long.
_GRACE_S = 2.0


class QueueReservations:
    """Requests let in a second, counted only while others wait; and the promises."""

    def __init__(
        self, client: EngineClient, clock_s: Callable[[], float], config: SchedulerSection
    ) -> None:
        self._client = client
        self._clock_s = clock_s
        self._config = config
        #: Requests let in, and seconds in which somebody waited: both fade with those seconds.
        self._num_started = 0.0
        self._queued_s = 0.0
        self._last_s = clock_s()
        self._is_full = False
        #: Let through since the engine's stats, which do not count them yet.
        self._num_passed = 0
        #: (when, whose), the next one first.
        self._promises: list[tuple[float, int]] = []
        client.on_step(self._on_step)

    def _on_step(self, num_step_tokens: int) -> None:
        del num_step_tokens
        stats, now_s = self._client.stats(), self._clock_s()
        if self._is_full:
            fades = 0.5 ** ((now_s - self._last_s) / _HALF_LIFE_S)
            self._num_started *= fades
            self._queued_s = self._queued_s * fades + now_s - self._last_s
        self._last_s, self._num_passed = now_s, 0
        num_running = stats.scheduler.num_running
        self._is_full = stats.num_waiting > 0 or num_running >= self._config.max_num_seqs

    def note_started(self) -> None:
        """Count a request that the queue has let in."""
        if self._is_full:
            self._num_started += 1

    def has_place(self, whose: int) -> bool:
        """Whether a request may be sent to the engine; if not, it would be refused there.

        `whose`: the same for a request that comes again, by which a promise is known.
        """
        stats, now_s = self._client.stats(), self._clock_s()
        num_waiting = stats.num_waiting + self._num_passed
        most = self._config.max_queue
        if not self._redeem(whose, now_s):
            # Half of the queue is everybody's: those who were promised a place may never come.
            most -= min(len(self._promises), most // 2)
        is_full = stats.scheduler.num_running + num_waiting >= self._config.max_num_seqs
        if is_full and num_waiting >= most:
            return False
        self._num_passed += 1
        return True

    def _redeem(self, whose: int, now_s: float) -> bool:
        while self._promises and self._promises[0][0] < now_s - _GRACE_S:
            del self._promises[0]
        for index, (at_s, owner) in enumerate(self._promises):
            if at_s > now_s:
                break
            if owner == whose:
                del self._promises[index]
                return True
        return False

    def retry_after_s(self, whose: int) -> int:
        """Promise a place and return in how many seconds, `LEAST_S` to `MOST_S`."""
        now_s = self._clock_s()
        queued_s = self._queued_s + (now_s - self._last_s if self._is_full else 0.0)
        # As measured; where that is little, no faster than a place a second comes near it.
        guessed_s = (queued_s + _NUM_GUESSED) / (self._num_started + _NUM_GUESSED)
        a_place_s = max(queued_s / max(1.0, self._num_started), guessed_s)
        left_s = (len(self._promises) + 1) * a_place_s * _MARGIN
        told_s = min(MOST_S, max(LEAST_S, math.ceil(left_s)))
        if left_s <= MOST_S:
            insort(self._promises, (now_s + told_s, whose))
        return told_s
