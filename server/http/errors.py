"""What goes wrong and how a client hears of it: one exception, one JSON shape, one mapping.

Three kinds only: the request is wrong (4xx), not now (429, 503 with Retry-After), a bug of ours
(500, without a word of the insides). Knows nothing of routes or of how bytes are sent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Protocol

import orjson
from pydantic import ValidationError

from scheduler.client import (
    EngineError,
    EngineUnavailableError,
    RejectKind,
    RequestRefusedError,
)
from server.http import sse

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
#: Where nothing better is known.
BUSY_RETRY_AFTER_S = 1
UNAVAILABLE_RETRY_AFTER_S = 5

_MAX_LISTED_FAULTS = 3
_MAX_ECHOED_CHARS = 200

#: What a message quotes of a request, such as a name. An apostrophe in a word opens no quotation.
_QUOTED = re.compile(r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""", re.DOTALL)


class ApiError(Exception):
    """An answer other than success. `param` names the field at fault, `code` is for machines.

    `log_reason`: the message for the log, which must not hold a client's text; by default the
    message without what it quotes. Give one where the message has such text without quotes.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        log_reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}
        self.log_reason = _QUOTED.sub("'…'", message) if log_reason is None else log_reason
        #: Of the request it answers; the boundary knows it.
        self.request_id = ""

    @property
    def type(self) -> str:
        """OpenAI's `error.type`."""
        return ERROR_TYPES.get(self.status, ERROR_TYPES[400])

    def body(self) -> bytes:
        """Return the JSON that tells it, the same in a response and in a stream."""
        return orjson.dumps(
            {
                "error": {
                    "message": self.message,
                    "type": self.type,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )


class ErrorForm(Protocol):
    """How the errors of one API look. All of them have OpenAI's `error` object."""

    def body(self, error: ApiError) -> bytes:
        """Return the JSON of an answer that is an error."""

    def stream_end(self, error: ApiError) -> bytes:
        """Return the events that end a stream which failed on its way."""


class OpenAIErrors:
    """See `ErrorForm`: OpenAI's, which is what every route has unless it says otherwise."""

    def body(self, error: ApiError) -> bytes:
        """See `ErrorForm`."""
        return error.body()

    def stream_end(self, error: ApiError) -> bytes:
        """See `ErrorForm`."""
        return sse.event(error.body()) + sse.DONE


class ClientGoneError(Exception):
    """The client closed its connection: there is nobody to tell anything."""


def invalid(
    message: str, param: str | None, code: str | None = None, *, log_reason: str | None = None
) -> ApiError:
    """Return the error for a request that is wrong in its field `param`."""
    return ApiError(400, message, param=param, code=code, log_reason=log_reason)


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
    """Return the error for a model nobody serves here."""
    message = f"model {shortened(name)!r} is not served here; GET /v1/models lists what is"
    return ApiError(404, message, param="model", code="model_not_found")


def from_engine(error: EngineError, retry_after_s: int = BUSY_RETRY_AFTER_S) -> ApiError:
    """Say an engine's refusal or failure in HTTP's terms.

    `retry_after_s`: when a queue that is full now will have room.
    """
    if isinstance(error, RequestRefusedError):
        if error.kind is RejectKind.INVALID:
            # What a grammar's library says has lines of the grammar in it.
            reason = "the grammar cannot be enforced" if error.param == "grammar" else None
            return invalid(str(error), error.param, log_reason=reason)
        headers = {"Retry-After": str(retry_after_s)}
        return ApiError(429, str(error), param=error.param, code="queue_full", headers=headers)
    if isinstance(error, EngineUnavailableError):
        return unavailable(str(error), retry_after_s=error.retry_after_s)
    return ApiError(500, str(error) or "the engine failed on this request", code="engine_fault")


def from_status(status: int, detail: str, headers: dict[str, str]) -> ApiError:
    """Say a router's 404 or 405 in our shape."""
    message = detail or HTTPStatus(status).phrase
    return ApiError(status, message, code=HTTPStatus(status).name.lower(), headers=headers)


def from_validation(error: ValidationError) -> ApiError:
    """Name the fields at fault; never their values, which may be somebody's prompt."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    first = faults[0]
    if first["type"] == "json_invalid":
        return invalid(first["msg"], None, code="invalid_json")
    told = [
        f"{_path(fault['loc'])}: {fault['msg'].removeprefix('Value error, ')}"
        for fault in faults[:_MAX_LISTED_FAULTS]
    ]
    left = len(faults) - len(told)
    more = f" (and {left} more)" if left else ""
    return invalid("; ".join(told) + more, _path(first["loc"]) or None)


def shortened(text: str) -> str:
    """Return `text` short enough to be echoed in a message or a log line."""
    return text if len(text) <= _MAX_ECHOED_CHARS else text[:_MAX_ECHOED_CHARS] + "…"


def _path(location: Sequence[Any]) -> str:
    return shortened(".".join(str(part) for part in location)) or "body"
