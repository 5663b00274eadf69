"""HTTP/1.1 below the application: what never becomes a request is answered, or given up, here.

uvicorn does the work; it would answer nonsense in plain text, and wait for ever for a client that
connects and says nothing, which costs a file descriptor each.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.errors import invalid

#: From the connection, or the first byte of a further request on it, to the end of the head.
HEAD_PATIENCE_S = 30.0


class HttpProtocol(HttpToolsProtocol):
    """See the module."""

    head_patience_s = HEAD_PATIENCE_S
    _giving_up: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request, but not for ever."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop_waiting()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Note the first byte of a request."""
        if self._giving_up is None:
            self._await_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """From here on it is a request; its body has a patience of its own."""
        self._stop_waiting()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Say that it was no HTTP, in the shape of every other error."""
        body = invalid(msg, None, code="invalid_http").body()
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _await_head(self) -> None:
        self._giving_up = self.loop.call_later(self.head_patience_s, self._give_up)

    def _stop_waiting(self) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None

    def _give_up(self) -> None:
        self.transport.close()
