"""Lets pages of other origins ask from a browser; only where the operator names them.

Stands outside even the boundary: preflights bring no key, and a page may read an error only if the
error carries the headers too. Preflights leave no log line.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from server.http.errors import invalid
from server.http.middleware import REQUEST_ID_HEADER

_PREFLIGHT_LASTS_S = 600


class Cors(CORSMiddleware):
    """Answers preflights, and marks answers as readable by `origins`.

    `methods`: those of the routes.
    """

    def __init__(self, app: ASGIApp, *, origins: tuple[str, ...], methods: Sequence[str]) -> None:
        # No credentials: a key is sent by the page itself, never by the browser of its own accord.
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=methods,
            allow_headers=("*",),
            expose_headers=(REQUEST_ID_HEADER, "Retry-After"),
            max_age=_PREFLIGHT_LASTS_S,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Return the answer; a refusal looks like every other error."""
        answer = super().preflight_response(request_headers)
        if answer.status_code == 200:
            return answer
        reason = bytes(answer.body).decode()
        body = invalid(f"{reason} (cors_origins)", None, code="cors").body()
        headers = {
            name: value
            for name, value in answer.headers.items()
            if name not in {"content-length", "content-type"}
        }
        return Response(body, answer.status_code, headers, media_type="application/json")
