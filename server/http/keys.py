"""The API keys: read from flags and a file, kept as digests, replaced while the server runs.

The keys themselves appear in no message, log line or attribute. Knows nothing of headers or routes.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import stat
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from configs.schema import ServerSection
from server.http.errors import BUSY_RETRY_AFTER_S, ApiError
from server.logs import LOGGER_NAME, fields

#: The `cache_namespace` of all keys that share cached prefixes with each other.
SHARED_NAMESPACE = "shared"

_log = logging.getLogger(LOGGER_NAME)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One accepted key, as a digest: the key cannot be restored."""

    digest: bytes
    #: May be empty. Several keys may share one, as when one replaces another.
    name: str = ""
    #: Requests that may run at once with it; None: no limit.
    max_requests: int | None = None
    #: As the operator set it; None: the owner's own.
    cache_namespace: str | None = None

    @property
    def owner(self) -> str:
        """The owner of stored responses: keys of one name share them."""
        return f"={self.name}" if self.name else f"#{self.digest.hex()}"

    @property
    def namespace(self) -> str:
        """The namespace within which cached prefixes are shared; empty: the shared one."""
        if self.cache_namespace is None:
            return self.owner
        return "" if self.cache_namespace == SHARED_NAMESPACE else f"={self.cache_namespace}"


class Keyring:
    """The accepted keys, and the number of requests that run with each."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._keys = tuple(keys)
        self._num_requests: dict[bytes, int] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no key is configured: then the server is open to all."""
        return not self._keys

    def find(self, secret: bytes) -> ApiKey | None:
        """Return the key equal to `secret`, in the same time for a near miss as for a match."""
        digest = digest_of(secret)
        matching = [key for key in self._keys if hmac.compare_digest(key.digest, digest)]
        return matching[0] if matching else None

    @contextmanager
    def request(self, key: ApiKey) -> Iterator[None]:
        """Count a request as running with `key`. Raises `ApiError` (429) at the key's limit."""
        running = self._num_requests.get(key.digest, 0)
        if key.max_requests is not None and running >= key.max_requests:
            message = f"{running} requests are running with this API key, which is its limit"
            headers = {"Retry-After": str(BUSY_RETRY_AFTER_S)}
            raise ApiError(429, message, code="key_limit", headers=headers)
        self._num_requests[key.digest] = running + 1
        try:
            yield
        finally:
            self._num_requests[key.digest] -= 1
            if not self._num_requests[key.digest]:
                del self._num_requests[key.digest]

    def replace(self, keys: Iterable[ApiKey]) -> None:
        """Accept these keys from now on. Running requests go on, and count for a key that stays."""
        self._keys = tuple(keys)

    def check(self) -> None:
        """Assert that every count is positive."""
        assert all(count > 0 for count in self._num_requests.values()), "a count of nothing"


def digest_of(secret: bytes) -> bytes:
    """Return the digest that is kept of a key."""
    return hashlib.sha256(secret).digest()


def load_keys(section: ServerSection) -> tuple[ApiKey, ...]:
    """Return the configured keys. Raises `ValueError`, whose message contains no key."""
    # Without a file, all keys are one operator's.
    namespace = SHARED_NAMESPACE if section.api_key_file is None else None
    entries = [_Entry(key=secret, cache_namespace=namespace) for secret in section.api_key]
    if section.api_key_file is not None:
        entries += _entries_in(section.api_key_file)
    found: dict[bytes, ApiKey] = {}
    for entry in entries:
        if not entry.key.strip() or not entry.key.isascii() or not entry.key.isprintable():
            raise ValueError("api_key must be visible ASCII, and not empty")
        limit = entry.max_concurrent_requests or section.max_requests_per_key
        digest = digest_of(entry.key.strip().encode())
        key = ApiKey(digest, entry.name, limit, entry.cache_namespace)
        if found.setdefault(key.digest, key) != key:
            named = f" (the one named {key.name!r})" if key.name else ""
            raise ValueError(f"the same key stands twice among the API keys{named}, and differs")
    return tuple(found.values())


def reload_keys(keyring: Keyring, section: ServerSection) -> None:
    """Read the key file again; if it is wrong, log the fault and keep the present keys."""
    try:
        keys = load_keys(section)
    except ValueError as error:
        _log.error("API keys not reloaded, the old ones stay", extra=fields(reason=str(error)))
        return
    keyring.replace(keys)
    _log.info("API keys reloaded", extra=fields(keys=len(keys)))


#: Visible ASCII, with spaces only inside: names that look alike are equal.
_Name = Annotated[str, Field(max_length=64, pattern=r"^([\x21-\x7e]+( +[\x21-\x7e]+)*)?$")]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    key: str
    name: _Name = ""
    max_concurrent_requests: int | None = Field(default=None, ge=1)
    cache_namespace: Annotated[_Name, Field(min_length=1)] | None = None


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    key: list[_Entry] = []


def _entries_in(path: Path) -> list[_Entry]:
    try:
        text = path.read_text()
        if path.stat().st_mode & stat.S_IROTH:
            _log.warning("other users can read the API keys; chmod 600", extra=fields(file=path))
    except (OSError, UnicodeDecodeError) as error:
        message = f"api_key_file {path} cannot be read: {error}"
        raise ValueError(message) from error
    # TOML has names and limits; any other file has one key a line.
    entries = _of_toml(text, path) if path.suffix == ".toml" else _of_lines(text)
    if not entries:
        message = f"api_key_file {path} holds no key; without one the server would be open to all"
        raise ValueError(message)
    return entries


def _of_lines(text: str) -> list[_Entry]:
    lines = (line.strip() for line in text.splitlines() if not line.startswith("#"))
    return [_Entry(key=line) for line in lines if line]


def _of_toml(text: str, path: Path) -> list[_Entry]:
    try:
        return _File.model_validate(tomllib.loads(text)).key
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        message = f"api_key_file {path}: {place}: {fault['msg']}"
    except tomllib.TOMLDecodeError as error:
        message = f"api_key_file {path} is not TOML: {error}"
    # Raised outside of `except`: the cause would contain the keys.
    raise ValueError(message)
