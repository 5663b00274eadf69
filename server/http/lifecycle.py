"""Counts the requests in flight, and drains them for a clean stop.

Knows nothing of signals (`server/daemon.py`) or of the content of requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from server.http.auth import PROBE_PATHS
from server.http.context import Interruption
from server.http.errors import unavailable

#: For the error answers of requests that are ended.
_END_TIMEOUT_S = 5.0


class Lifecycle:
    """Takes requests, then drains; never the other way."""

    def __init__(self) -> None:
        self._is_draining = False
        self._in_flight: dict[int, Interruption] = {}
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused."""
        return self._is_draining

    @property
    def num_in_flight(self) -> int:
        """The number of requests that are being answered."""
        return len(self._in_flight)

    @contextmanager
    def request(self, *, is_counted: bool = True) -> Iterator[Interruption]:
        """Count the current task's request as in flight until the block is left.

        Probes are not counted: they are answered while the server drains.
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
        """Refuse new requests from now on. May be called again."""
        self._is_draining = True

    async def wait_idle(self, timeout_s: float | None) -> bool:
        """Wait until nothing is in flight, at most `timeout_s`; return whether that succeeded."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            return False
        return True

    def end_running(self) -> None:
        """Fail the running requests with 503, in their streams if these have begun."""
        for interruption in list(self._in_flight.values()):
            interruption.interrupt(
                unavailable("the server is shutting down; this request was ended", is_closing=True)
            )

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, let running ones finish, and end them after `timeout_s`.

        Returns whether all finished in time. When it returns, all others have received their error,
        unless that takes more than `_END_TIMEOUT_S`.
        """
        self.begin_drain()
        has_finished = await self.wait_idle(timeout_s)
        if not has_finished:
            self.end_running()
            await self.wait_idle(_END_TIMEOUT_S)
        return has_finished

    def check(self) -> None:
        """Assert that the idle mark and the count agree."""
        assert self._is_idle.is_set() == (not self._in_flight), "the idle mark is wrong"


class DrainGate:
    """Raises `ApiError` (503), which `server/http/middleware.py` sends; probes pass."""

    def __init__(self, app: ASGIApp, *, lifecycle: Lifecycle) -> None:
        self._app = app
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request unless the server drains."""
        is_request = scope["type"] == "http" and scope["path"] not in PROBE_PATHS
        if is_request and self._lifecycle.is_draining:
            raise unavailable("the server is shutting down; ask another", is_closing=True)
        await self._app(scope, receive, send)
