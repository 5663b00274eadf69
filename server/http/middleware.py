"""The outermost layer: every request gets an id, one log line and an answer in every case.

The one place where an exception becomes bytes: a JSON response before the first byte is sent, an
event in the stream after it. Knows nothing of the routes behind it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scheduler.client import EngineError
from server.http import sse
from server.http.auth import PROBE_PATHS
from server.http.context import (
    SCOPE_KEY,
    BodyBudget,
    Clock,
    Interruption,
    RequestContext,
    RequestRecord,
)
from server.http.errors import (
    ApiError,
    ClientGoneError,
    ErrorForm,
    from_engine,
    shortened,
)
from server.http.event_stream import send_json
from server.http.lifecycle import Lifecycle
from server.logs import LOGGER_NAME, fields, log_request
from server.metrics import Metrics

REQUEST_ID_HEADER = "X-Request-Id"
#: Anthropic's clients read the second one, OpenAI's the first.
_REQUEST_ID_HEADERS = (REQUEST_ID_HEADER.lower().encode(), b"request-id")
#: In the log and the metrics: the client left before its answer (nginx' code).
CLIENT_GONE_STATUS = 499
#: Time to send an error to a client that may not read.
FAREWELL_S = 1.0

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestMiddleware:
    """See the module."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        lifecycle: Lifecycle,
        metrics: Metrics,
        clock: Clock,
        chance: random.Random,
        max_body_bytes: int,
        error_forms: Mapping[str, ErrorForm] | None = None,
    ) -> None:
        """`error_forms`: of the paths whose errors do not look like OpenAI's."""
        self._app = app
        self._error_forms = error_forms or {}
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._clock = clock
        self._chance = chance
        self._bodies = BodyBudget(max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; there are no web sockets here."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        record = self._record(scope)
        form = self._error_forms.get(scope["path"]) or ErrorForm()
        is_probe = scope["path"] in PROBE_PATHS
        with self._lifecycle.request(is_counted=not is_probe) as interruption:
            scope[SCOPE_KEY] = RequestContext(record, interruption, self._bodies)
            reply = _Reply(send, record, form, interruption)
            try:
                async with interruption.reasoned():
                    await self._app(scope, receive, reply.send)
            except ClientGoneError:
                record.status = CLIENT_GONE_STATUS
            except asyncio.CancelledError:
                record.status = record.status or CLIENT_GONE_STATUS
                raise
            except Exception as error:  # noqa: BLE001 - the last place that can answer the client
                await self._fail(reply, _as_api_error(error, record), record)
            finally:
                self._metrics.on_response(record.status)
                log_request(record, self._clock.monotonic_s(), is_probe=is_probe)

    async def _fail(self, reply: _Reply, error: ApiError, record: RequestRecord) -> None:
        record.error = error
        if error.status in {429, 503} and error.code:
            self._metrics.on_rejected(error.code)
        await reply.fail(error)

    def _record(self, scope: Scope) -> RequestRecord:
        client = scope.get("client")
        return RequestRecord(
            request_id=_given_id(scope) or f"{self._chance.getrandbits(128):032x}",
            method=scope["method"],
            path=shortened(scope["path"]),
            client=client[0] if client else "",
            arrived_at_s=self._clock.monotonic_s(),
        )


class _Reply:
    """The part of one response that has been sent."""

    def __init__(
        self, send: Send, record: RequestRecord, form: ErrorForm, interruption: Interruption
    ) -> None:
        self._send = send
        self._interruption = interruption
        self._record = record
        self._form = form
        self._has_started = False
        self._is_stream = False
        self._is_complete = False

    async def send(self, message: Message) -> None:
        """Send on, with the request's id, noting the status."""
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            self._has_started = True
            self._is_stream = any(header in sse.HEADERS[:1] for header in headers)
            self._record.status = message["status"]
            request_id = self._record.request_id.encode()
            headers += [(name, request_id) for name in _REQUEST_ID_HEADERS]
            message = {**message, "headers": headers}
        else:
            self._is_complete = not message.get("more_body", False)
        await self._send(message)
        if self._is_complete:
            # The server calls this a disconnect too; there may be some tidying up to do yet.
            self._interruption.close()

    async def fail(self, error: ApiError) -> None:
        """Send the error to the client, in the way that is still possible."""
        error.request_id = self._record.request_id
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                if not self._has_started:
                    body = self._form.body(error)
                    await send_json(self.send, error.status, body, error.headers)
                elif self._is_stream and not self._is_complete:
                    self._record.status = error.status
                    body = (self._record.stream_end or self._form.stream_end)(error)
                    await self.send({"type": "http.response.body", "body": body})


def _given_id(scope: Scope) -> str | None:
    values = [value for key, value in scope["headers"] if key == _REQUEST_ID_HEADERS[0]]
    given = values[0].decode("latin-1") if len(values) == 1 else ""
    return given if _REQUEST_ID.fullmatch(given) else None


def _as_api_error(error: Exception, record: RequestRecord) -> ApiError:
    """Log a fault of ours with its traceback; return an error without internal details."""
    logger = logging.getLogger(LOGGER_NAME)
    if isinstance(error, EngineError):
        error = from_engine(error)
    if isinstance(error, ApiError):
        # A 503 is not a fault: the server stops, or the client is to try again later.
        if error.status == HTTPStatus.INTERNAL_SERVER_ERROR:
            extra = fields(id=record.request_id, status=error.status, reason=error.log_reason)
            logger.error("request failed", extra=extra)
        return error
    extra = fields(id=record.request_id, status=500)
    logger.error("request failed by a bug", exc_info=error, extra=extra)
    message = f"internal error; the server's log has details under id {record.request_id}"
    return ApiError(500, message)
