"""Who may ask: API keys, checked before any route is looked up.

Deny by default: a path is open only if it stands, letter by letter, in the list of open paths, so
no spelling of another path (`//`, a trailing slash, a prefix, another method) is let through.
Keys are kept as digests, compared in constant time, and never logged.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from configs.schema import ServerSection
from server.errors import ApiError

#: What probes and scrapers ask for; open unless `protect_metrics` is set.
PROBE_PATHS = frozenset({"/health", "/ready", "/metrics"})


class Keyring:
    """The accepted keys' digests."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = tuple(_digest(key.encode()) for key in keys)

    @property
    def is_empty(self) -> bool:
        """Whether no key is configured: then everybody may ask."""
        return not self._digests

    def accepts(self, key: bytes) -> bool:
        """Whether `key` is one of them; takes as long for a near miss as for a hit."""
        digest = _digest(key)
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found


def load_keys(section: ServerSection) -> tuple[str, ...]:
    """Return the configured keys. Raises `ValueError` for a key file that holds none."""
    keys = section.api_key
    if section.api_key_file is not None:
        keys += _keys_in(section.api_key_file)
    if any(not key.strip() or not key.isascii() for key in keys):
        raise ValueError("api_key must be visible ASCII, and not empty")
    return keys


class AuthMiddleware:
    """Answers 401 to whoever brings no accepted key. Raises `ApiError` for the boundary to tell."""

    def __init__(self, app: ASGIApp, *, keyring: Keyring, open_paths: frozenset[str]) -> None:
        self._app = app
        self._keyring = keyring
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is allowed."""
        is_lifespan = scope["type"] == "lifespan"
        if not is_lifespan and not self._keyring.is_empty:
            self._check(scope)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        if scope["path"] in self._open_paths:
            return
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        if scheme.lower() != b"bearer" or not self._keyring.accepts(key.strip()):
            raise ApiError(
                401,
                "a valid API key is needed: send it as 'Authorization: Bearer <key>'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _keys_in(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        message = f"api_key_file {path} cannot be read: {error}"
        raise ValueError(message) from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        message = f"api_key_file {path} holds no key; without one the server would be open to all"
        raise ValueError(message)
    return keys


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
