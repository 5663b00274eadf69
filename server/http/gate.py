"""Turns new requests away while the server drains. Knows nothing of why."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from server.http.auth import PROBE_PATHS
from server.http.errors import unavailable
from server.http.lifecycle import Lifecycle


class DrainGate:
    """Raises `ApiError` (503) for the boundary to tell; probes pass."""

    def __init__(self, app: ASGIApp, *, lifecycle: Lifecycle) -> None:
        self._app = app
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or not."""
        is_asked = scope["type"] == "http" and scope["path"] not in PROBE_PATHS
        if is_asked and self._lifecycle.is_draining:
            raise unavailable("the server is shutting down; ask another", is_closing=True)
        await self._app(scope, receive, send)
