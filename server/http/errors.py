"""Errors that a client gets: one exception, one JSON shape, one mapping.

Three kinds only: the request is wrong (4xx), not now (429, 503 with Retry-After), a bug of ours
(500, without internal details). Knows nothing of routes or of how bytes are sent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from http import HTTPStatus
from typing import TypeAlias

import orjson
from pydantic import ValidationError

from scheduler.client import EngineError, EngineUnavailableError, RejectKind, RequestRefusedError
from server.http import sse

#: Keys and indexes that lead to a value in the body of a request, as its API has it.
Path: TypeAlias = tuple[str | int, ...]
#: OpenAI's `error.type` of each status we answer with.
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
#: Where there is no better estimate.
BUSY_RETRY_AFTER_S = 1
UNAVAILABLE_RETRY_AFTER_S = 5

_MAX_LISTED_FAULTS = 3
_MAX_ECHOED_CHARS = 200

#: A quotation from a request, such as a name. An apostrophe in a word opens no quotation.
_QUOTED = re.compile(r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""", re.DOTALL)


class ApiError(Exception):
    """An answer other than success. `path` leads to the field at fault, `code` is for machines.

    `log_reason`: the message for the log, which must not contain text of a client; by default the
    message without its quotations. Needed where the message has such text without quotes.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        path: Path = (),
        code: str | None = None,
        headers: dict[str, str] | None = None,
        log_reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.path = path
        self.code = code
        self.headers = headers or {}
        self.log_reason = _QUOTED.sub("'…'", message) if log_reason is None else log_reason
        #: Of the request that failed; the middleware sets it.
        self.request_id = ""

    @property
    def type(self) -> str:
        """OpenAI's `error.type`."""
        return ERROR_TYPES.get(self.status, ERROR_TYPES[400])

    @property
    def param(self) -> str | None:
        """The field at fault, as all three APIs write it."""
        return shortened(dotted(self.path)) or None

    def body(self) -> bytes:
        """Return the JSON of the error, the same in a response and in a stream."""
        names = ("message", "type", "param", "code")
        return orjson.dumps({"error": {name: getattr(self, name) for name in names}})


class ErrorForm:
    """The form of one API's errors: here OpenAI's, which is the default of every route."""

    def body(self, error: ApiError) -> bytes:
        """Return the JSON of an answer that is an error."""
        return error.body()

    def stream_end(self, error: ApiError) -> bytes:
        """Return the events that end a stream which failed on its way."""
        return sse.event(error.body()) + sse.DONE


class ClientGoneError(Exception):
    """The client closed its connection, so no answer can be sent."""


def invalid(
    message: str, at: Path | str | None, code: str | None = None, *, log_reason: str | None = None
) -> ApiError:
    """Return the error for a request that is wrong at a path, or in the field of that name."""
    path = (at,) if isinstance(at, str) else at or ()
    return ApiError(400, message, path=path, code=code, log_reason=log_reason)


def unavailable(
    message: str, *, is_closing: bool = False, retry_after_s: float | None = None
) -> ApiError:
    """Return the error for a service that does not serve now; `is_closing`: nor on this socket."""
    seconds = UNAVAILABLE_RETRY_AFTER_S if retry_after_s is None else math.ceil(retry_after_s)
    headers = {"Retry-After": str(max(1, seconds))}
    if is_closing:
        headers["Connection"] = "close"
    return ApiError(503, message, code="unavailable", headers=headers)


def model_not_found(name: str) -> ApiError:
    """Return the error for a model that is not served here."""
    message = f"model {shortened(name)!r} is not served here; GET /v1/models lists what is"
    return ApiError(404, message, path=("model",), code="model_not_found")


def from_engine(error: EngineError, retry_after_s: int = BUSY_RETRY_AFTER_S) -> ApiError:
    """Return the HTTP error for an engine's refusal or failure.

    `retry_after_s`: the time until a full queue is expected to have room.
    """
    if isinstance(error, RequestRefusedError):
        if error.kind is RejectKind.INVALID:
            # The message of the grammar library contains lines of the grammar.
            reason = "the grammar cannot be enforced" if error.param == "grammar" else None
            return invalid(str(error), error.param, log_reason=reason)
        headers = {"Retry-After": str(retry_after_s)}
        path = () if error.param is None else (error.param,)
        return ApiError(429, str(error), path=path, code="queue_full", headers=headers)
    if isinstance(error, EngineUnavailableError):
        return unavailable(str(error), retry_after_s=error.retry_after_s)
    return ApiError(500, str(error) or "the engine failed on this request", code="engine_fault")


def from_status(status: int, detail: str, headers: dict[str, str]) -> ApiError:
    """Return a router's 404 or 405 in our shape."""
    message = detail or HTTPStatus(status).phrase
    return ApiError(status, message, code=HTTPStatus(status).name.lower(), headers=headers)


def from_validation(
    error: ValidationError, at: Path = (), path_of: Callable[[Path], Path] | None = None
) -> ApiError:
    """Return the error that names the fields at fault, but not their values, which may be private.

    `at`: path of the validated value; `path_of`: maps pydantic's location to a path in that value.
    """
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    if faults[0]["type"] == "json_invalid":
        return invalid(faults[0]["msg"], None, code="invalid_json")
    paths = [
        (*at, *(fault["loc"] if path_of is None else path_of(fault["loc"]))) or ("body",)
        for fault in faults[:_MAX_LISTED_FAULTS]
    ]
    messages = [
        f"{shortened(dotted(path))}: {fault['msg'].removeprefix('Value error, ')}"
        for path, fault in zip(paths, faults, strict=False)
    ]
    left = len(faults) - len(messages)
    more = f" (and {left} more)" if left else ""
    return invalid("; ".join(messages) + more, paths[0])


def dotted(path: Path) -> str:
    """Return a path as errors and warnings name it."""
    return ".".join(map(str, path))


def shortened(text: str) -> str:
    """Return `text` short enough to be echoed in a message or a log line."""
    return text if len(text) <= _MAX_ECHOED_CHARS else text[:_MAX_ECHOED_CHARS] + "…"
