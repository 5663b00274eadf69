"""Allows requests from pages of the origins that the operator names.

It is the outermost layer: preflights have no key, and a page may read an error only if the error
has the headers too. Preflights are not logged.
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
    """Answers preflights, and marks answers as readable by `origins`."""

    def __init__(self, app: ASGIApp, *, origins: tuple[str, ...], methods: Sequence[str]) -> None:
        # No credentials: the page itself sends a key, never the browser.
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=methods,
            allow_headers=("*",),
            expose_headers=(REQUEST_ID_HEADER, "Retry-After"),
            max_age=_PREFLIGHT_LASTS_S,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Return the answer; a refusal has the form of every other error."""
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
