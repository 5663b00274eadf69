"""The API's side of the engine's messages: one stream a request, fed by columns, read as deltas.

Knows nothing of how messages travel, or of when a stream may be given to an engine
(`scheduler/isolation.py`). Everything here happens on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from itertools import count, repeat

from model.interface import TokenLogprobs
from scheduler.client import (
    Delta,
    EngineError,
    EngineFaultError,
    GenerateRequest,
    RequestRefusedError,
)
from scheduler.messages import Begun, Cancel, EngineStats, FinishReason, Started, StepResult, Submit


@dataclass(slots=True)
class Suspicion:
    """What speaks for it that engines die of a request; `scheduler/isolation.py` judges."""

    #: Engines that died with it, one after another, at the same place of its output.
    num_deaths: int = 0
    #: How much speaks against it alone.
    weight: int = 0
    #: Tokens received when the last of them died.
    num_tokens: int = 0
    #: Times it was run alone, and how many tokens it is to have before others run again.
    num_turns: int = 0
    turn_ends: int = 0


class Stream:
    """What one request has been told and has not read yet; bounded by its `max_tokens`."""

    __slots__ = (
        "_error",
        "_finish_reason",
        "_logprobs",
        "_prompt_logprobs",
        "_started",
        "_token_ids",
        "_wakes",
        "arrival",
        "has_begun",
        "has_left",
        "is_given",
        "num_scored",
        "sent_token_ids",
        "submit",
        "suspicion",
        "was_given",
    )

    def __init__(self, submit: Submit) -> None:
        self.submit = submit
        #: Smaller: opened earlier.
        self.arrival = submit.request_id
        #: Every token received, so that another engine can go on from here.
        self.sent_token_ids: list[int] = []
        #: Whether an engine was ever given it, and whether the one there is now has it.
        self.was_given = self.is_given = False
        #: Whether the engine has done anything for this request, or is about to.
        self.has_begun = False
        #: Whether its reader went away before the end.
        self.has_left = False
        self.suspicion = Suspicion()
        #: Tokens of the prompt whose probabilities were received.
        self.num_scored = 0
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs | None] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._started: Started | None = None
        self._finish_reason: FinishReason | None = None
        self._error: EngineError | None = None
        self._wakes = asyncio.Event()

    @property
    def request_id(self) -> int:
        """What the engine calls it."""
        return self.submit.request_id

    @property
    def is_over(self) -> bool:
        """Whether nothing more is wanted of an engine."""
        return self.has_left or self._finish_reason is not None or self._error is not None

    def add_token(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Take in the next token."""
        self.sent_token_ids.append(token_id)
        self._token_ids.append(token_id)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        self._wakes.set()

    def add_scores(self, scores: tuple[TokenLogprobs, ...]) -> None:
        """Take in the next tokens of the prompt; they are read with what follows them."""
        self.num_scored += len(scores)
        self._prompt_logprobs += scores

    def resumed(self) -> Submit:
        """Return what makes another engine go on where this stream is; at first, the request."""
        if not self.was_given:
            return self.submit
        return replace(
            self.submit,
            output_token_ids=tuple(self.sent_token_ids),
            num_scored=self.num_scored,
            is_resumed=True,
        )

    def start(self, started: Started) -> None:
        """Note the admission; a resumed stream keeps what it was told first."""
        if not self.sent_token_ids:
            self._started = started

    def finish(self, reason: FinishReason) -> None:
        """End after what is unread."""
        self._finish_reason = reason
        self._wakes.set()

    def fail(self, error: EngineError) -> None:
        """End with an error after what is unread."""
        self._error = error
        self._wakes.set()

    async def read(self) -> Delta:
        """Wait for news. Raises the stream's error once all before it was read."""
        await self._wakes.wait()
        self._wakes.clear()
        if self._error is not None:
            if not self._token_ids:
                raise self._error
            self._wakes.set()
        delta = Delta(
            tuple(self._token_ids),
            tuple(self._logprobs),
            self._started,
            self._finish_reason,
            tuple(self._prompt_logprobs),
        )
        self._prompt_logprobs.clear()
        self._token_ids.clear()
        self._logprobs.clear()
        self._started = None
        return delta


@dataclass(frozen=True, slots=True)
class StreamsStats:
    """One moment of the streams."""

    num_open: int


class Streams:
    """All open streams of one client, and the newest stats."""

    def __init__(self) -> None:
        self._ids = count()
        self._open: dict[int, Stream] = {}
        self._end: tuple[type[EngineError], str] | None = None
        self._observers: list[Callable[[int], None]] = []
        self.engine_stats = EngineStats()

    def on_step(self, observer: Callable[[int], None]) -> None:
        """Call `observer` with each step's number of tokens."""
        self._observers.append(observer)

    async def generate(
        self, request: GenerateRequest, send: Callable[[Submit | Cancel], None]
    ) -> AsyncGenerator[Delta, None]:
        """Submit, then yield until the end; cancel if the reader leaves before it.

        `send` may hold a `Submit` back for as long as it likes.
        """
        if self._end is not None:
            kind, message = self._end
            raise kind(message)
        submit = Submit(
            next(self._ids),
            request.prompt_token_ids,
            request.params,
            priority=request.priority,
            namespace=request.namespace,
        )
        stream = self._open[submit.request_id] = Stream(submit)
        try:
            send(submit)
            finish_reason = None
            while finish_reason is None:
                delta = await stream.read()
                finish_reason = delta.finish_reason
                yield delta
        finally:
            del self._open[stream.request_id]
            if not stream.is_over:
                stream.has_left = True
                send(Cancel(stream.request_id))

    def get(self, request_id: int) -> Stream:
        """Return the open stream of that id. Raises `KeyError`."""
        return self._open[request_id]

    def renew(self, stream: Stream) -> None:
        """Give a stream another id: what is still on its way under the old one is of no use."""
        del self._open[stream.request_id]
        stream.submit = replace(stream.submit, request_id=next(self._ids))
        stream.is_given = stream.has_begun = False
        self._open[stream.request_id] = stream

    def begin(self, begun: Begun) -> None:
        """Note of whom the engine may die from now on."""
        for request_id in begun.request_ids:
            if request_id in self._open:
                self._open[request_id].has_begun = True

    def dispatch(self, result: StepResult) -> None:
        """Hand a step's columns to their streams; those of requests nobody reads are dropped."""
        self.engine_stats = result.stats
        streams = self._open
        for started in result.started:
            if started.request_id in streams:
                streams[started.request_id].start(started)
        for request_id, scores in result.prompt_logprobs:
            if request_id in streams:
                streams[request_id].add_scores(scores)
        logprobs = result.logprobs or repeat(None)
        for request_id, token_id, logprob in zip(
            result.request_ids, result.token_ids, logprobs, strict=False
        ):
            if request_id in streams:
                streams[request_id].add_token(token_id, logprob)
        self._dispatch_ends(result)
        if result.num_step_tokens:
            for observe in self._observers:
                observe(result.num_step_tokens)

    def _dispatch_ends(self, result: StepResult) -> None:
        streams = self._open
        for refused in result.rejected:
            if refused.request_id in streams:
                error = RequestRefusedError(refused.message, refused.kind, refused.param)
                streams[refused.request_id].fail(error)
        for request_id, reason, message in result.finished:
            if request_id in streams:
                _end(streams[request_id], reason, message)

    def unfinished(self) -> list[Stream]:
        """Return the streams that still wait for an engine, in the order they were opened."""
        streams = [stream for stream in self._open.values() if not stream.is_over]
        return sorted(streams, key=lambda stream: stream.arrival)

    def close(self, kind: type[EngineError], message: str) -> None:
        """End every stream that is not over yet, and all to come, each with an error of its own."""
        self._end = self._end or (kind, message)
        for stream in self.unfinished():
            stream.fail(kind(message))

    def stats(self) -> StreamsStats:
        """Return a snapshot."""
        return StreamsStats(num_open=len(self._open))

    def check(self) -> None:
        """Assert that streams stand under their own ids."""
        for request_id, stream in self._open.items():
            assert stream.submit.request_id == request_id, "a stream under another's id"


def _end(stream: Stream, reason: FinishReason, message: str) -> None:
    if reason is FinishReason.ERROR:
        stream.fail(EngineFaultError(message))
    else:
        stream.finish(reason)
