"""Refuses new requests while the server drains. Knows nothing of the reason."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from server.http.auth import PROBE_PATHS
from server.http.errors import unavailable
from server.http.lifecycle import Lifecycle


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
