"""Ends a request that takes too long, in the queue or in the middle of its answer.

Ending its task also frees the engine's pages. Knows nothing of the content of requests.
"""

from __future__ import annotations

import asyncio

from server.http.context import Clock, RequestContext
from server.http.errors import ApiError, Path

DEADLINE_CODE = "deadline_exceeded"


class Deadline:
    """The earliest of several time limits, all counted from the request's arrival."""

    def __init__(self, context: RequestContext, clock: Clock) -> None:
        self._context = context
        self._clock = clock
        self._timers: list[asyncio.TimerHandle] = []

    def of_request(self, timeout_s: float | None) -> None:
        """Apply the time limit of its client, if any."""
        if timeout_s is not None:
            message = f"the request was not finished within its timeout of {timeout_s:g} seconds"
            self._end_after(timeout_s, message, ("timeout",))

    def of_server(self, timeout_s: float | None) -> None:
        """Apply the operator's time limit for every request, if any."""
        if timeout_s is not None:
            message = f"the request took longer than the {timeout_s:g} seconds this server allows"
            self._end_after(timeout_s, message)

    def close(self) -> None:
        """Remove the limits."""
        for timer in self._timers:
            timer.cancel()

    def _end_after(self, limit_s: float, message: str, path: Path = ()) -> None:
        # OpenAI's and Anthropic's clients would repeat a 408 twice without this header.
        headers = {"X-Should-Retry": "false"}
        error = ApiError(408, message, path=path, code=DEADLINE_CODE, headers=headers)
        left_s = self._context.record.arrived_at_s + limit_s - self._clock.monotonic_s()
        loop = asyncio.get_running_loop()
        interrupt = self._context.interruption.interrupt
        self._timers.append(loop.call_later(max(0.0, left_s), interrupt, error))
