"""Whether new requests are taken, and how many are being answered: what a clean stop needs.

Knows nothing of signals (`server/daemon.py` does) or of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from server.http.context import Interruption
from server.http.errors import unavailable

#: For those that are ended to say so.
_END_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class LifecycleStats:
    """One moment of it."""

    num_in_flight: int
    is_draining: bool


class Lifecycle:
    """Taking requests, then draining; never back."""

    def __init__(self) -> None:
        self._is_draining = False
        self._in_flight: dict[int, Interruption] = {}
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def is_draining(self) -> bool:
        """Whether new requests are turned away."""
        return self._is_draining

    @contextmanager
    def request(self, *, is_counted: bool = True) -> Iterator[Interruption]:
        """Count the current task's request as in flight until the block is left.

        Probes are not counted: they go on being answered while the server drains.
        """
        interruption = Interruption()
        if not is_counted:
            yield interruption
            return
        self._in_flight[id(interruption)] = interruption
        self._is_idle.clear()
        try:
            yield interruption
        finally:
            del self._in_flight[id(interruption)]
            if not self._in_flight:
                self._is_idle.set()

    def begin_drain(self) -> None:
        """Turn new requests away from now on. Again is fine."""
        self._is_draining = True

    async def wait_idle(self, timeout_s: float | None) -> bool:
        """Wait until nothing is in flight, at most `timeout_s`; return whether that came true."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            return False
        return True

    def end_running(self) -> None:
        """Let what still runs fail with 503, in its stream if it has begun one."""
        for interruption in list(self._in_flight.values()):
            interruption.interrupt(
                unavailable("the server is shutting down; this request was ended", is_closing=True)
            )

    async def drain(self, timeout_s: float) -> bool:
        """Turn new requests away, let running ones finish, end those that need too long.

        Returns whether all finished of themselves. At its return all others have been told so, but
        for what does not let itself be ended within `_END_TIMEOUT_S`.
        """
        self.begin_drain()
        has_finished = await self.wait_idle(timeout_s)
        if not has_finished:
            self.end_running()
            await self.wait_idle(_END_TIMEOUT_S)
        return has_finished

    def stats(self) -> LifecycleStats:
        """Return a snapshot."""
        return LifecycleStats(len(self._in_flight), self._is_draining)

    def check(self) -> None:
        """Assert that the idle mark and the count agree."""
        assert self._is_idle.is_set() == (not self._in_flight), "the idle mark is wrong"
