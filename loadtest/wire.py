"""HTTP/1.1 for a load generator: as little work as possible between the socket and the clock.

The generator shares the machine with the server it measures, so its own CPU time matters. Here a
chunk of a stream is one callback: half the time of aiohttp, a fifth of httpx
(`bench/load_client.py` compares them).
Knows nothing of tokens, events or JSON.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import SplitResult, urlsplit

from httptools import HttpParserCallbackError, HttpParserError, HttpResponseParser

#: Called with each piece of a body and the moment it arrived.
Sink = Callable[[bytes, float], None]


class WireError(Exception):
    """No answer, or half of one. `kind` is a word to count it by."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(slots=True)
class Head:
    """The head before a body. Names of headers are in lower case."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)


class Connection(asyncio.Protocol):
    """One connection; one exchange at a time."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._transport: asyncio.Transport | None = None
        self._parser = HttpResponseParser(self)
        self._done: asyncio.Future[Head] | None = None
        self._take: Callable[[Head], Sink] | None = None
        self._sink: Sink | None = None
        self._head = Head()
        self._now_s = 0.0
        self._has_begun = False

    @property
    def is_open(self) -> bool:
        """Whether another exchange can begin."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def has_begun(self) -> bool:
        """Whether any byte of an answer to the last request has come."""
        return self._has_begun

    async def exchange(self, request: bytes, take: Callable[[Head], Sink]) -> Head:
        """Send a whole request and return once its answer is complete.

        `take` is given the answer's head and returns where its body goes. Raises `WireError`.
        """
        assert self._done is None, "one exchange at a time"
        if self._transport is None:
            raise WireError("reset", "the server had closed the connection")
        self._head, self._has_begun, self._take = Head(), False, take
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._done
        except BaseException:
            # Cancelled or broken: no request expects the remaining bytes.
            self.close()
            raise
        finally:
            self._done = self._take = self._sink = None

    def close(self) -> None:
        """Let go of the socket, at once."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    # ---- asyncio.Protocol ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        # uvloop's transports have its methods, but not its class.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._now_s = self._clock_s()
        self._has_begun = True
        try:
            self._parser.feed_data(data)
        except HttpParserCallbackError as error:
            # A sink raised: a bug of ours, not of the server.
            self._fail(error.__context__ or error)
        except HttpParserError as error:
            self._fail(WireError("malformed", f"no HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._transport = None
        if exc is None and self._head.status and self._ends_with_connection():
            self.on_message_complete()
        else:
            message = str(exc or "the server closed the connection before the end")
            self._fail(WireError("reset", message))

    # ---- httptools -------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """See `HttpResponseParser`."""
        self._head.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """See `HttpResponseParser`."""
        self._head.status = self._parser.get_status_code()
        if self._take is not None:
            self._sink = self._take(self._head)

    def on_body(self, body: bytes) -> None:
        """See `HttpResponseParser`."""
        if self._sink is not None:
            self._sink(body, self._now_s)

    def on_message_complete(self) -> None:
        """See `HttpResponseParser`."""
        if self._done is not None and not self._done.done():
            self._done.set_result(self._head)
        if self._transport is not None and not self._parser.should_keep_alive():
            self.close()

    def _ends_with_connection(self) -> bool:
        named = self._head.headers
        return "content-length" not in named and "transfer-encoding" not in named

    def _fail(self, error: BaseException) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


@dataclass(frozen=True, slots=True)
class PoolStats:
    """One moment of a pool; `opened_total` only grows."""

    num_busy: int
    num_idle: int
    opened_total: int


class Pool:
    """Connections to one server, as many as there are exchanges at a time; idle ones are reused."""

    def __init__(self, url: str, clock_s: Callable[[], float]) -> None:
        """Take the server's URL, a path before its routes included. Raises `ValueError`."""
        self._url = _parsed(url)
        self._clock_s = clock_s
        self._tls = ssl.create_default_context() if self._url.scheme == "https" else None
        self._idle: list[Connection] = []
        self._busy: list[Connection] = []
        self._opened_total = 0

    async def request(
        self,
        method: str,
        path: str,
        take: Callable[[Head], Sink],
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> Head:
        """Exchange a request for an answer; see `Connection.exchange`. Raises `WireError`."""
        request = self._encoded(method, path, headers or {}, body)
        connection = self._take_idle()
        if connection is not None:
            try:
                return await self._exchange(connection, request, take)
            except WireError:
                # It may have been closed for idleness just as we wrote; nothing was answered, so
                # every client retries on a new one (RFC 9112, 9.3.1).
                if connection.has_begun:
                    raise
        return await self._exchange(await self._opened(), request, take)

    async def _exchange(
        self, connection: Connection, request: bytes, take: Callable[[Head], Sink]
    ) -> Head:
        self._busy.append(connection)
        try:
            return await connection.exchange(request, take)
        finally:
            self._busy.remove(connection)
            if connection.is_open:
                self._idle.append(connection)

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _opened(self) -> Connection:
        host, port = self._url.hostname or "", self._port()
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(self._clock_s), host, port, ssl=self._tls
            )
        except OSError as error:
            raise WireError("connect", f"cannot connect to {host}:{port}: {error}") from error
        self._opened_total += 1
        return connection

    def _port(self) -> int:
        return self._url.port or (443 if self._tls else 80)

    def _encoded(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> bytes:
        lines = [
            f"{method} {self._url.path.rstrip('/')}{path} HTTP/1.1",
            f"Host: {self._url.netloc.rpartition('@')[2]}",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body

    def close(self) -> None:
        """Close all connections; running exchanges end with a `WireError`."""
        for connection in [*self._idle, *self._busy]:
            connection.close()
        self._idle.clear()

    def stats(self) -> PoolStats:
        """Return a snapshot."""
        return PoolStats(len(self._busy), len(self._idle), self._opened_total)

    def check(self) -> None:
        """Assert that each connection is in one place."""
        places = [id(connection) for connection in [*self._idle, *self._busy]]
        assert len(places) == len(set(places)), "a connection is used twice"
        assert len(places) <= self._opened_total, "a connection nobody opened"


def _parsed(url: str) -> SplitResult:
    parsed = urlsplit(url)
    if parsed.scheme not in ("http", "https") or not parsed.hostname:
        raise ValueError(f"{url!r} is no URL of a server; it looks like http://127.0.0.1:8000")
    try:
        parsed.port  # noqa: B018 - reading it validates it
    except ValueError as error:
        raise ValueError(f"{url!r}: {error}") from error
    return parsed
