"""Reserves places in a full queue, and computes the Retry-After of refused requests.

A refused client gets a reservation: the next place that the queue is expected to have, at its
measured rate, and that is not reserved yet. Until then reserved places stay free. Knows nothing of
HTTP, nor of the engine's own refusals.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable

from configs.schema import SchedulerSection
from scheduler.client import EngineClient

#: A measurement of this age counts half.
_HALF_LIFE_S = 20.0
#: Bounds of Retry-After: clients wait whole seconds, and OpenAI's no more than a minute. A request
#: that would have to wait longer gets the maximum, and no reservation.
MIN_S, MAX_S = 1, 60
#: Requests assumed to have been admitted, one a second, before the first measurement.
_NUM_GUESSED = 5
#: Answers differ in length: Retry-After is longer than the expected wait by this factor.
_MARGIN = 1.25
#: A reservation expires this long after its time.
_GRACE_S = 2.0


class QueueReservations:
    """The rate of admissions, measured only while requests wait, and the reservations."""

    def __init__(
        self, client: EngineClient, clock_s: Callable[[], float], config: SchedulerSection
    ) -> None:
        self._client = client
        self._clock_s = clock_s
        self._config = config
        #: Requests admitted, and seconds with a queue: both decay with those seconds.
        self._num_started = 0.0
        self._queued_s = 0.0
        self._last_s = clock_s()
        self._is_full = False
        #: Requests passed since the engine's stats, which do not count them yet.
        self._num_passed = 0
        #: (time, client), the next one first.
        self._reserved: list[tuple[float, int]] = []
        client.on_step(self._on_step)

    def _on_step(self, num_step_tokens: int) -> None:
        del num_step_tokens
        stats, now_s = self._client.stats(), self._clock_s()
        if self._is_full:
            decay = 0.5 ** ((now_s - self._last_s) / _HALF_LIFE_S)
            self._num_started *= decay
            self._queued_s = self._queued_s * decay + now_s - self._last_s
        self._last_s, self._num_passed = now_s, 0
        num_running = stats.scheduler.num_running
        self._is_full = stats.num_waiting > 0 or num_running >= self._config.max_num_seqs

    def note_started(self) -> None:
        """Count a request that the queue has admitted."""
        if self._is_full:
            self._num_started += 1

    def has_place(self, retry_key: int) -> bool:
        """Return whether a request may be sent to the engine, which would refuse it otherwise.

        `retry_key` identifies the client of a repeated request, and so its reservation.
        """
        stats, now_s = self._client.stats(), self._clock_s()
        num_waiting = stats.num_waiting + self._num_passed
        limit = self._config.max_queue
        if not self._redeem(retry_key, now_s):
            # Half of the queue is never reserved: a client may not return.
            limit -= min(len(self._reserved), limit // 2)
        is_full = stats.scheduler.num_running + num_waiting >= self._config.max_num_seqs
        if is_full and num_waiting >= limit:
            return False
        self._num_passed += 1
        return True

    def _redeem(self, retry_key: int, now_s: float) -> bool:
        while self._reserved and self._reserved[0][0] < now_s - _GRACE_S:
            del self._reserved[0]
        for index, (at_s, owner) in enumerate(self._reserved):
            if at_s > now_s:
                break
            if owner == retry_key:
                del self._reserved[index]
                return True
        return False

    def retry_after_s(self, retry_key: int) -> int:
        """Reserve a place and return the seconds until then, `MIN_S` to `MAX_S`."""
        now_s = self._clock_s()
        queued_s = self._queued_s + (now_s - self._last_s if self._is_full else 0.0)
        # The measured rate; with few measurements, close to one place a second.
        guessed_s = (queued_s + _NUM_GUESSED) / (self._num_started + _NUM_GUESSED)
        a_place_s = max(queued_s / max(1.0, self._num_started), guessed_s)
        left_s = (len(self._reserved) + 1) * a_place_s * _MARGIN
        wait_s = min(MAX_S, max(MIN_S, math.ceil(left_s)))
        if left_s <= MAX_S:
            insort(self._reserved, (now_s + wait_s, retry_key))
        return wait_s
