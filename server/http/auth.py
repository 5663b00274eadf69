"""Checks API keys before any route is looked up.

Denies by default: a path is open only if it stands, letter by letter, in the list of open paths.
So no spelling of another path (`//`, a trailing slash, a prefix, another method) passes.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from server.http.context import RequestContext
from server.http.errors import ApiError
from server.http.keys import ApiKey, Keyring

#: Paths of probes and scrapers; open unless `protect_metrics` is set.
PROBE_PATHS = frozenset({"/health", "/ready", "/metrics"})


class AuthMiddleware:
    """Refuses requests without an accepted key (401), and requests beyond their key's limit (429).

    Raises `ApiError`, which `server/http/middleware.py` sends. Only POST requests count for a key's
    limit: a key at its limit may still read the models and the metrics.
    """

    def __init__(self, app: ASGIApp, *, keyring: Keyring, open_paths: frozenset[str]) -> None:
        self._app = app
        self._keyring = keyring
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request if it is allowed."""
        is_lifespan = scope["type"] == "lifespan"
        if is_lifespan or self._keyring.is_empty or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        key = self._accepted(scope)
        record = RequestContext.of(scope).record
        record.key_name, record.owner, record.namespace = key.name, key.owner, key.namespace
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        with self._keyring.request(key):
            await self._app(scope, receive, send)

    def _accepted(self, scope: Scope) -> ApiKey:
        secret = _presented(scope)
        key = None if secret is None else self._keyring.find(secret)
        if key is None:
            raise ApiError(
                401,
                "a valid API key is needed: send it as 'Authorization: Bearer <key>'"
                " or as 'x-api-key: <key>'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return key


def _presented(scope: Scope) -> bytes | None:
    """Return the key in OpenAI's header, Anthropic's or both; None if there is not exactly one."""
    bearer = [value for name, value in scope["headers"] if name == b"authorization"]
    plain = [value.strip() for name, value in scope["headers"] if name == b"x-api-key"]
    if len(bearer) > 1 or len(plain) > 1:
        return None
    for value in bearer:
        scheme, _, secret = value.partition(b" ")
        plain.append(secret.strip() if scheme.lower() == b"bearer" else b"")
    return plain[0] if len(set(plain)) == 1 else None
