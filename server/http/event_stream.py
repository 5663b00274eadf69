"""Sends a response: whole, or as server-sent events, kept alive while there is none.

Knows nothing of the content of events, or of how the stream fails (`server/http/middleware.py`).
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from starlette.types import Send

from server.http import sse


async def send_json(
    send: Send, status: int, body: bytes, headers: dict[str, str] | None = None
) -> None:
    """Send a whole response."""
    listed = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    listed += [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": listed})
    await send({"type": "http.response.body", "body": body})


class EventStream:
    """Writes whole events. Awaiting a write is the backpressure: it waits for a slow reader.

    After `keep_alive_s` without a write it writes a comment, which clients skip. So neither they
    nor a proxy take a request in the queue or a long prompt for a dead connection. The comment
    begins the response, so later errors are sent in the stream.
    """

    def __init__(self, send: Send, keep_alive_s: float) -> None:
        """`keep_alive_s` of 0: never."""
        self._send = send
        self._keep_alive_s = keep_alive_s
        self._has_begun = False
        self._is_over = False
        self._written_at_s = 0.0
        #: Events may not be mixed, nor come before the response has begun.
        self._turn = asyncio.Lock()
        self._keeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._written_at_s = asyncio.get_running_loop().time()
        if self._keep_alive_s:
            self._keeper = asyncio.create_task(self._keep_alive())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])

    async def write(self, events: bytes, *, is_last: bool = False) -> None:
        """Send `events`; nothing may follow the last."""
        async with self._turn:
            if not self._has_begun:
                self._has_begun = True
                start = {"type": "http.response.start", "status": 200, "headers": [*sse.HEADERS]}
                await self._send(start)
            self._is_over = is_last
            body = {"type": "http.response.body", "body": events, "more_body": not is_last}
            await self._send(body)
            self._written_at_s = asyncio.get_running_loop().time()

    async def _keep_alive(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._is_over:
            silent_s = loop.time() - self._written_at_s
            if silent_s < self._keep_alive_s:
                await asyncio.sleep(self._keep_alive_s - silent_s)
            elif self._turn.locked():
                # The client has not read the last events yet.
                await asyncio.sleep(self._keep_alive_s)
            else:
                await self.write(sse.KEEP_ALIVE)
