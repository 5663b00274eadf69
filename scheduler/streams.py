"""The API's side of the engine's messages: one stream a request, fed by columns, read as deltas.

Knows nothing of how messages travel. Everything here happens on one event loop.
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
        "has_begun",
        "num_crashes",
        "num_scored",
        "sent_token_ids",
        "submit",
    )

    def __init__(self, submit: Submit) -> None:
        self.submit = submit
        #: Every token received, so that another engine can go on from here.
        self.sent_token_ids: list[int] = []
        #: Whether the engine has done anything for this request, or is about to.
        self.has_begun = False
        #: Engines that died after they had begun with this request.
        self.num_crashes = 0
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
    def is_over(self) -> bool:
        """Whether the engine has said its last word on it."""
        return self._finish_reason is not None or self._error is not None

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
        """Return what makes another engine go on where this stream is."""
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
        self._observers: list[Callable[[int], None]] = []
        self.engine_stats = EngineStats()

    def on_step(self, observer: Callable[[int], None]) -> None:
        """Call `observer` with each step's number of tokens."""
        self._observers.append(observer)

    async def generate(
        self, request: GenerateRequest, send: Callable[[Submit | Cancel], None]
    ) -> AsyncGenerator[Delta, None]:
        """Submit, then yield until the end; cancel if the reader leaves before it."""
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
            del self._open[submit.request_id]
            if not stream.is_over:
                send(Cancel(submit.request_id))

    def begin(self, begun: Begun) -> None:
        """Note of whom the engine may die from now on."""
        for request_id in begun.request_ids:
            if request_id in self._open:
                self._open[request_id].has_begun = True

    def note_crash(self) -> list[Stream]:
        """Count the engine's death against those it may have died of, and return these.

        Where it had begun with nobody, whatever it died of was in what they all sent.
        """
        unfinished = self.unfinished()
        suspects = [stream for stream in unfinished if stream.has_begun] or unfinished
        for stream in suspects:
            stream.num_crashes += 1
        for stream in unfinished:
            stream.has_begun = False
        return suspects

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
        """Return the streams that still wait for the engine, in the order they were opened.

        May be asked from another thread: the copy is made in one go.
        """
        return [stream for stream in list(self._open.values()) if not stream.is_over]

    def fail_all(self, kind: type[EngineError], message: str) -> None:
        """End every stream that is not over yet, each with an error of its own."""
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
