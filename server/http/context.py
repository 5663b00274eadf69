"""The record of one HTTP request while it is answered, and its interruption from outside.

Knows nothing of the content of requests.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

from starlette.types import Receive, Scope

from scheduler.cache_story import NO_STORY, CacheStory
from server.answer_types import Comparison
from server.http.errors import ApiError, ClientGoneError, unavailable

SCOPE_KEY = "octavo.request"


@dataclass(frozen=True, slots=True)
class Clock:
    """The two clocks of a server, both in seconds: one for durations, one for dates."""

    monotonic_s: Callable[[], float] = time.monotonic
    wall_s: Callable[[], float] = time.time


@dataclass(slots=True)
class RequestRecord:
    """Data of a request for its log line, the metrics and the `octavo` object of its response."""

    request_id: str
    method: str
    path: str
    client: str
    #: On the monotonic clock, like every `*_at_s` here.
    arrived_at_s: float
    status: int = 0
    #: Empty for a request that generates nothing.
    model: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    #: Before breakpoints and not cached, by lifetime; None: the request asks for no caching.
    written_tokens: Mapping[str, int] | None = None
    #: Pins that were not set, and older ones that ended for those of the request.
    num_refused_pins: int = 0
    num_displaced_pins: int = 0
    #: The request's own label, for the log line.
    cache_key: str = ""
    output_tokens: int = 0
    #: Those of them that are reasoning; None: the model does not reason.
    reasoning_tokens: int | None = None
    #: Tokens of drafts that were verified, and those of them that were accepted.
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    #: Tokens that were not in view at the end.
    dropped_tokens: int = 0
    story: CacheStory = NO_STORY
    queue_s: float | None = None
    first_token_at_s: float | None = None
    last_token_at_s: float | None = None
    finish_reason: str = ""
    #: The stop string that ended the output.
    stop_text: str | None = None
    #: Gives the events that end the current stream if it fails; None: the route's error form does.
    stream_end: Callable[[ApiError], bytes] | None = field(default=None, repr=False)
    #: Of the API key, if it has a name.
    key_name: str = ""
    #: Of the API key: see `ApiKey`. Empty where none is needed.
    owner: str = ""
    namespace: str = ""
    #: The same for a request that comes again: of client and body.
    whose: int = 0
    #: With the earlier request that it names.
    comparison: Comparison | None = None
    #: The answer, where it is an error.
    error: ApiError | None = None

    @property
    def ttft_s(self) -> float | None:
        """From the request's arrival to its first token."""
        first = self.first_token_at_s
        return None if first is None else first - self.arrived_at_s

    @property
    def prefill_s(self) -> float | None:
        """From admission to the first token."""
        if self.ttft_s is None or self.queue_s is None:
            return None
        return max(0.0, self.ttft_s - self.queue_s)

    @property
    def decode_s(self) -> float | None:
        """From the first token to the last."""
        if self.first_token_at_s is None or self.last_token_at_s is None:
            return None
        return self.last_token_at_s - self.first_token_at_s

    @property
    def inference_s(self) -> float | None:
        """From admission to the last token."""
        if self.prefill_s is None or self.decode_s is None:
            return None
        return self.prefill_s + self.decode_s


class Interruption:
    """Ends the task that answers a request, with a reason; as `asyncio.timeout` does.

    The task is cancelled and finds its `CancelledError` turned into the reason where it leaves
    `reasoned()`. Only the first reason counts.
    """

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "a request is answered in a task"
        self._task = task
        self._num_cancels_before = task.cancelling()
        self._reason: Exception | None = None
        self._is_closed = False

    def interrupt(self, reason: Exception) -> None:
        """Let the request fail with `reason`, unless it is over or interrupted already."""
        if self._reason is None and not self._is_closed:
            self._reason = reason
            self._task.cancel()

    def close(self) -> None:
        """Note that all was answered: from now on there is nothing to interrupt."""
        self._is_closed = True

    @asynccontextmanager
    async def reasoned(self) -> AsyncIterator[None]:
        """Raise the reason in place of the cancellation it caused."""
        try:
            yield
        except asyncio.CancelledError:
            if self._reason is None or self._task.uncancel() > self._num_cancels_before:
                raise
            raise self._reason from None
        finally:
            self.close()

    @asynccontextmanager
    async def on_disconnect(self, receive: Receive) -> AsyncIterator[None]:
        """Interrupt as soon as the client is gone. The body must have been read."""
        watcher = asyncio.create_task(self._watch(receive))
        try:
            yield
        finally:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.interrupt(ClientGoneError())


class BodyBudget:
    """Bytes of the bodies that are being read; one client may have half of them."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = Counter[str]()

    @contextmanager
    def reading(self, client: str) -> Iterator[Callable[[int], None]]:
        """Give a counter of received bytes, which raises `ApiError` (503) for one too many."""
        num_held = 0

        def take(num_bytes: int) -> None:
            nonlocal num_held
            num_held += num_bytes
            self._held[client] += num_bytes
            if max(self._held.total(), 2 * self._held[client]) > self._max_bytes:
                raise unavailable("too much is being sent to the server", is_closing=True)

        try:
            yield take
        finally:
            self._held[client] -= num_held
            # Drops the clients that hold none.
            self._held += Counter()


@dataclass(frozen=True, slots=True)
class RequestContext:
    """Travels in the ASGI scope from the middleware to the routes."""

    record: RequestRecord
    interruption: Interruption = field(repr=False)
    bodies: BodyBudget = field(repr=False)

    @staticmethod
    def of(scope: Scope) -> RequestContext:
        """Return the context of the request in hand."""
        context = scope[SCOPE_KEY]
        assert isinstance(context, RequestContext), "the middleware puts it there"
        return context
