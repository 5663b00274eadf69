"""HTTP/1.1 below the application: refuses input that never becomes a request.

uvicorn parses, but accepts heads, trailers and idle connections without limit. Here everything but
bodies has a bound in bytes and in time, and each address a bound in connections. The application
reads bodies (`server/generation/respond.py`), until it has answered.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from http import HTTPStatus
from typing import Any

import httptools
from starlette.types import Message, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.http.errors import ApiError, invalid

#: From the connection, or the first byte of a further request on it, to the end of the head. Also
#: from an answer before the end of the body to that end; the rest of the body is dropped.
HEAD_TIMEOUT_S = 30.0
#: Bytes of one request beside its body: request line, headers, trailers, and chunk sizes and
#: extensions as far as they are longer than the chunks.
MAX_HEAD_BYTES = 32_768
MAX_HEADERS = 128
#: Requests sent before the answer to the first.
MAX_PIPELINED = 16
#: After the last answer: the most seconds until the client has to close, and the most bytes of it
#: that are dropped meanwhile.
LINGER_TIMEOUT_S = 2.0
MAX_LINGER_BYTES = 4 * 1024**2
#: Granularity of the count.
_SLICE_BYTES = 8192


class _TooMuchError(Exception):
    """Raised in the parser's callbacks to end the parsing."""


class HttpProtocol(HttpToolsProtocol):
    """See the module."""

    head_timeout_s = HEAD_TIMEOUT_S
    _giving_up: asyncio.TimerHandle | None = None
    #: Whether the present request has begun and not ended, and its head likewise.
    _is_in_request = _is_in_head = False
    #: Its bytes beside the body.
    _num_head_bytes = 0
    #: Whether all that is sent has been, and received bytes are dropped until the client closes.
    _is_lingering = False
    _num_dropped_bytes = 0

    def __init__(
        self,
        *args: Any,  # noqa: ANN401 - uvicorn's
        connections_by_address: Counter[str] | None = None,
        max_per_address: int = 0,
        **named: Any,  # noqa: ANN401 - uvicorn's
    ) -> None:
        """`connections_by_address` is shared by all; `max_per_address`: 0: no limit."""
        super().__init__(*args, **named)
        self._counts = Counter[str]() if connections_by_address is None else connections_by_address
        self._max_per_address = max_per_address
        self._address = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request, within the time limit."""
        super().connection_made(transport)
        self._await_end()
        self._address = _address_of(self.client)
        self._counts[self._address] += 1
        if self._address and 0 < self._max_per_address < self._counts[self._address]:
            message = f"more than {self._max_per_address} connections from your address"
            headers = {"Retry-After": "1"}
            self._refuse(ApiError(429, message, code="connection_limit", headers=headers))

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop counting the connection."""
        self._stop_waiting()
        self._counts[self._address] -= 1
        if not self._counts[self._address]:
            del self._counts[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the data; a request to upgrade the protocol is ignored."""
        view, start = memoryview(data), 0
        if self._is_lingering:
            self._num_dropped_bytes += len(data)
            if self._num_dropped_bytes > MAX_LINGER_BYTES:
                self.transport.close()
        while start < len(view) and not self.is_ending:
            some = view[start : start + _SLICE_BYTES]
            start += len(some)
            self._num_head_bytes += len(some)
            try:
                self.parser.feed_data(some)
            except httptools.HttpParserUpgrade as upgrade:
                start += upgrade.args[0] - len(some)
            except httptools.HttpParserError as error:
                is_too_much = isinstance(error.__context__, _TooMuchError)
                message = "what came is no HTTP/1.1 request"
                self._refuse(_too_much() if is_too_much else invalid(message, None, "invalid_http"))
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self._refuse(_too_much())

    def on_message_begin(self) -> None:
        """Note the first byte of a request."""
        self._unset_keepalive_if_required()
        self._is_in_request = self._is_in_head = True
        if self._giving_up is None:
            self._await_end()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header; trailers are ignored."""
        if self._is_in_head:
            if len(self.headers) == MAX_HEADERS:
                raise _TooMuchError
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the request; its body has a time limit of its own."""
        self._is_in_head = False
        self._stop_waiting()
        if len(self.pipeline) == MAX_PIPELINED:
            raise _TooMuchError
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            self.cycle.transport = _AnswerTransport(self)
            if self.parser.get_http_version() == "1.0":
                self.cycle.send = _unchunked(self.cycle)  # type: ignore[assignment, method-assign] # as uvicorn calls it

    def on_body(self, body: bytes) -> None:
        """Pass on a part of the body."""
        # It was counted, and a chunk may have as many bytes around it.
        self._num_head_bytes = max(0, self._num_head_bytes - 2 * len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Reset the count."""
        self._is_in_request = False
        self._num_head_bytes = 0
        self._stop_waiting()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the rest of this request or for the next one, within the time limit."""
        if self.is_ending:
            return
        super().on_response_complete()
        if self._is_in_request:
            self._unset_keepalive_if_required()
            if self.cycle.response_complete and self._giving_up is None:
                self._await_end()

    def shutdown(self) -> None:
        """End the connection as soon as its answers allow: the server stops."""
        if self._is_lingering:
            self.transport.close()
        else:
            super().shutdown()

    def linger(self) -> None:
        """End the connection such that the client can read the last answer.

        To close a socket with unread bytes resets the connection, and many clients then drop an
        answer that they have received (RFC 9112, section 9.6). So send the end alone, and close
        after the client. TLS has an exchange of its own at the end.
        """
        if self.is_ending:
            return
        if not self.transport.can_write_eof():
            self.transport.close()
            return
        self._is_lingering = True
        self._stop_waiting()
        self._unset_keepalive_if_required()
        self.transport.write_eof()
        self.flow.resume_reading()
        self._giving_up = self.loop.call_later(LINGER_TIMEOUT_S, self.transport.close)

    @property
    def is_ending(self) -> bool:
        """Return whether nothing is sent any more."""
        return self._is_lingering or self.transport.is_closing()

    def _refuse(self, error: ApiError) -> None:
        """Send the error, except in the middle of an answer, and end the connection."""
        if self.is_ending:
            return
        cycle = self.cycle
        has_request = cycle is not None
        is_answering = has_request and cycle.response_started and not cycle.response_complete
        if not is_answering and not self.pipeline:
            body = error.body()
            sizes = {"content-type": "application/json", "content-length": str(len(body))}
            lines = (f"{name}: {value}\r\n" for name, value in {**sizes, **error.headers}.items())
            status = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
            head = f"{status}{''.join(lines)}connection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
        if has_request:
            cycle.disconnected = True
            cycle.message_event.set()
        self.linger()

    def _await_end(self) -> None:
        self._giving_up = self.loop.call_later(self.head_timeout_s, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None


class _AnswerTransport(asyncio.Transport):
    """The transport of one answer: its end lets the client read the answer."""

    def __init__(self, protocol: HttpProtocol) -> None:
        super().__init__()
        self._protocol = protocol

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send a part of the answer."""
        self._protocol.transport.write(data)

    def is_closing(self) -> bool:
        """Return whether no more can be sent."""
        return self._protocol.is_ending

    def close(self) -> None:
        """End the connection after the answer."""
        self._protocol.linger()


def _unchunked(cycle: RequestResponseCycle) -> Send:
    """Return the `send` of a cycle whose client supports no chunks: closing ends the body.

    uvicorn closes after each answer to HTTP/1.0, but sends an answer without a length in chunks.
    """
    send: Send = cycle.send  # type: ignore[assignment] # uvicorn's types of the same messages
    has_length = False

    async def send_plain(message: Message) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            names = [name.lower() for name, _ in message.get("headers", ())]
            has_length = b"content-length" in names
            cycle.chunked_encoding = None if has_length else False
        elif message["type"] == "http.response.body" and not has_length:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    return send_plain


def _too_much() -> ApiError:
    message = f"more than {MAX_HEAD_BYTES} bytes or {MAX_HEADERS} headers beside the body"
    return ApiError(431, message, code="head_too_large")


def _address_of(client: tuple[str, int] | None) -> str:
    """Return the address that a connection counts for; of IPv6, the network of a typical host."""
    if client is None or ":" not in client[0]:
        return client[0] if client else ""
    return str(ipaddress.ip_network((client[0].partition("%")[0], 64), strict=False))
