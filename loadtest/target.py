"""The server under test: its description, and one streamed request to it.

Knows the routes of OpenAI's API and where servers differ; nothing of workloads or figures.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from loadtest.answer import Answer, message_of
from loadtest.records import Failure
from loadtest.sse import EventReader
from loadtest.wire import Head, Pool, Sink, WireError

#: For questions beside the load.
_TIMEOUT_S = 60.0
_BUSY = (429, 503)


class TargetError(Exception):
    """The server cannot be tested; the message is one line for the person who asked."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a streamed request ended."""

    failure: Failure | None
    #: The Retry-After of the server.
    retry_after_s: float | None = None


class Target:
    """One OpenAI-compatible server."""

    def __init__(
        self, name: str, url: str, api_key: str = "", clock_s: Callable[[], float] | None = None
    ) -> None:
        """See `Pool`: raises `ValueError` for a URL that is none."""
        self.name = name
        self.url = url.rstrip("/").removesuffix("/v1")
        self.clock_s = clock_s or time.perf_counter
        self.pool = Pool(self.url, self.clock_s)
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def stream(
        self, path: str, body: dict[str, Any], timeout_s: float, answer: Answer
    ) -> Outcome:
        """Request a streamed answer and read it to its end. Failures are returned, not raised.

        `answer` is filled as events come.
        """
        rejected: list[bytes] = []
        head: Head | None = None
        events = EventReader()

        def take(found: Head) -> Sink:
            nonlocal head
            head = found
            if found.status != 200 or "event-stream" not in found.headers.get("content-type", ""):
                return lambda data, _: rejected.append(data)
            return read

        def read(data: bytes, now_s: float) -> None:
            for payload in events.feed(data):
                answer.take(payload, now_s)

        failure = None
        try:
            async with asyncio.timeout(timeout_s):
                await self.pool.request(
                    "POST", path, take, headers=self._headers, body=orjson.dumps(body)
                )
        except WireError as error:
            failure = Failure(error.kind, str(error))
        except TimeoutError:
            failure = Failure("timeout", f"no end of the answer within {timeout_s:g} s")
        if head is not None and head.status != 200:
            failure = Failure(f"http {head.status}", _told(b"".join(rejected)))
        elif rejected:
            failure = Failure("no stream", _told(b"".join(rejected)))
        elif failure is None:
            answer.end()
        return Outcome(answer.failure or failure, _retry_after_s(head))

    async def get(self, path: str) -> tuple[int, Any]:
        """Return the status and the body: JSON, or its text. Raises `TargetError`."""
        return await self._call("GET", path, b"")

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """See `get`."""
        return await self._call("POST", path, orjson.dumps(body))

    async def _call(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        pieces: list[bytes] = []
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                head = await self.pool.request(
                    method,
                    path,
                    lambda _: lambda data, _: pieces.append(data),
                    headers=self._headers,
                    body=body,
                )
        except WireError as error:
            raise TargetError(f"{self.url} does not answer: {error}") from error
        except TimeoutError as error:
            raise TargetError(f"{self.url}{path}: no answer in {_TIMEOUT_S:g} s") from error
        return head.status, _decoded(b"".join(pieces))

    async def models(self) -> list[str]:
        """Return the names of the served models. Raises `TargetError`."""
        status, content = await self.get("/v1/models")
        if status in (401, 403):
            raise TargetError(f"{self.url} wants an API key: {message_of(content)} (--api-key)")
        listed = content.get("data") if isinstance(content, dict) else None
        names = [one.get("id") for one in listed or () if isinstance(one, dict)]
        found = [name for name in names if isinstance(name, str)]
        if status != 200 or not found:
            raise TargetError(f"{self.url}/v1/models names no model (status {status}); use --model")
        return found

    async def version(self) -> str | None:
        """Return the version in `/version` (ours, vLLM) or `/props` (llama-server), or None."""
        for path, key in (("/version", "version"), ("/props", "build_info")):
            status, content = await self.get(path)
            if status == 200 and isinstance(content, dict) and isinstance(content.get(key), str):
                version: str = content[key]
                return version
        return None

    async def token_ids(self, text: str, model: str) -> list[int] | None:
        """Return the text's tokens, or None where the server has no route for that."""
        for body in (
            {"model": model, "prompt": text, "add_special_tokens": False},
            {"content": text, "add_special": False},
        ):
            status, content = await self.post("/tokenize", body)
            tokens = content.get("tokens") if status == 200 and isinstance(content, dict) else None
            # llama-server finds no text in vLLM's field and answers with no tokens.
            if isinstance(tokens, list) and tokens and all(type(one) is int for one in tokens):
                return tokens
        return None

    def close(self) -> None:
        """Close the connections."""
        self.pool.close()


def _decoded(body: bytes) -> Any:  # noqa: ANN401 - any JSON
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode(errors="replace")


def _told(body: bytes) -> str:
    return message_of(_decoded(body))


def _retry_after_s(head: Head | None) -> float | None:
    if head is None or head.status not in _BUSY:
        return None
    try:
        return max(0.0, float(head.headers.get("retry-after", "1")))
    except ValueError:
        # A date: not worth a clock.
        return 1.0
