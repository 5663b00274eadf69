"""The API's side of the engine's messages: one stream a request, fed by columns, read as deltas.

Knows nothing of how messages travel, or of when a stream may be given to an engine
(`scheduler/isolation.py`). Everything here happens on one event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, repeat

from model.interface import TokenLogprobs
from scheduler.cache_story import CacheStory
from scheduler.client import (
    EngineError,
    EngineFaultError,
    EngineUnavailableError,
    RequestRefusedError,
)
from scheduler.messages import (
    Begun,
    CacheAnswer,
    CacheCommand,
    Cancel,
    ExplainPrefix,
    FinishReason,
    GenerateRequest,
    Pinned,
    Started,
    StepResult,
    Submit,
    TokenOutput,
)
from scheduler.stats import EngineStats


@dataclass(slots=True)
class Suspicion:
    """Evidence that a request crashes engines; `scheduler/isolation.py` judges by it."""

    #: Consecutive engines that crashed with it at the same place of its output.
    num_deaths: int = 0
    #: Evidence against this request alone.
    weight: int = 0
    #: Tokens received at the last of these crashes.
    num_tokens: int = 0
    #: Times it was run alone, and how many tokens it is to have before others run again.
    num_turns: int = 0
    turn_ends: int = 0


@dataclass(slots=True, eq=False)
class Stream:
    """The output of one request that was received and not read yet; bounded by `max_tokens`."""

    #: In the engine.
    request_id: int
    request: GenerateRequest
    #: Its id in the first engine: smaller is earlier.
    arrival: int
    #: Every token received, so that another engine can go on from here.
    sent_token_ids: list[int] = field(default_factory=list)
    #: Prompt tokens whose logprobs were received.
    num_scored: int = 0
    #: Whether any engine ever had it, and whether the current one has it.
    was_given: bool = False
    is_given: bool = False
    #: Whether the engine has begun to work on this request.
    has_begun: bool = False
    #: Whether its reader left before the end.
    has_left: bool = False
    suspicion: Suspicion = field(default_factory=Suspicion)
    _token_ids: list[int] = field(default_factory=list)
    _logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    _prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    _draft_tokens: int = 0
    _accepted_draft_tokens: int = 0
    _started: Started | None = None
    _pinned: Pinned | None = None
    _finish_reason: FinishReason | None = None
    _error: EngineError | None = None
    _wakes: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_over(self) -> bool:
        """Whether no engine needs to work on it any more."""
        return self.has_left or self._finish_reason is not None or self._error is not None

    def submit(self) -> Submit:
        """Return the message that makes an engine go on where this stream is."""
        return Submit(
            self.request_id,
            self.request,
            output_token_ids=tuple(self.sent_token_ids),
            num_scored=self.num_scored,
            is_resumed=self.was_given,
        )

    def add_token(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Add the next token."""
        self.sent_token_ids.append(token_id)
        self._token_ids.append(token_id)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        self._wakes.set()

    def add_scores(self, scores: tuple[TokenLogprobs, ...]) -> None:
        """Add logprobs of the next prompt tokens; they are read with the output that follows."""
        self.num_scored += len(scores)
        self._prompt_logprobs += scores

    def add_drafts(self, num_offered: int, num_accepted: int) -> None:
        """Count tokens of drafts; they are read with the output that follows."""
        self._draft_tokens += num_offered
        self._accepted_draft_tokens += num_accepted

    def start(self, started: Started) -> None:
        """Note the admission, unless a resumed stream has had output before."""
        if not self.sent_token_ids:
            self._started = started

    def pin(self, pinned: Pinned) -> None:
        """Note the effect of the request's pins; that in the newest engine counts."""
        self._pinned = pinned

    def finish(self, reason: FinishReason) -> None:
        """End after the unread output."""
        self._finish_reason = reason
        self._wakes.set()

    def fail(self, error: EngineError) -> None:
        """End with an error after the unread output."""
        self._error = error
        self._wakes.set()

    async def read(self) -> TokenOutput:
        """Wait for output and return it. Raise the stream's error behind the last output."""
        await self._wakes.wait()
        self._wakes.clear()
        if self._error is not None:
            if not self._token_ids:
                raise self._error
            self._wakes.set()
        output = TokenOutput(
            tuple(self._token_ids),
            tuple(self._logprobs),
            self._started,
            self._finish_reason,
            tuple(self._prompt_logprobs),
            self._draft_tokens,
            self._accepted_draft_tokens,
            self._pinned,
        )
        self._draft_tokens = self._accepted_draft_tokens = 0
        self._pinned = None
        self._prompt_logprobs.clear()
        self._token_ids.clear()
        self._logprobs.clear()
        self._started = None
        return output


class Streams:
    """All open streams of one client, its waiting cache commands, and the newest stats."""

    def __init__(self) -> None:
        self._ids = count()
        self._open: dict[int, Stream] = {}
        self._commands: deque[asyncio.Future[CacheAnswer]] = deque()
        self._end: tuple[type[EngineError], str] | None = None
        self._observers: list[Callable[[int], None]] = []
        self.engine_stats = EngineStats()

    def on_step(self, observer: Callable[[int], None]) -> None:
        """Call `observer` with each step's number of tokens."""
        self._observers.append(observer)

    async def generate(
        self, request: GenerateRequest, send: Callable[[Submit | Cancel], None]
    ) -> AsyncGenerator[TokenOutput, None]:
        """Submit, then yield until the end; cancel if the reader leaves before it.

        `send` may hold a `Submit` back.
        """
        if self._end is not None:
            kind, message = self._end
            raise kind(message)
        request_id = next(self._ids)
        stream = self._open[request_id] = Stream(request_id, request, request_id)
        try:
            send(stream.submit())
            finish_reason = None
            while finish_reason is None:
                output = await stream.read()
                finish_reason = output.finish_reason
                yield output
        finally:
            del self._open[stream.request_id]
            if not stream.is_over:
                stream.has_left = True
                send(Cancel(stream.request_id))

    async def change_cache(
        self, command: CacheCommand, send: Callable[[CacheCommand], None]
    ) -> int:
        """Send a command and return its answer, a number. Raises `EngineUnavailableError`."""
        number = await self._answer(command, send)
        assert isinstance(number, int), "the answer to another command"
        return number

    async def explain_cache(
        self, command: ExplainPrefix, send: Callable[[CacheCommand], None]
    ) -> CacheStory:
        """Send a question about a prompt. Raises `EngineUnavailableError`."""
        story = await self._answer(command, send)
        assert isinstance(story, CacheStory), "the answer to another command"
        return story

    async def _answer(
        self, command: CacheCommand, send: Callable[[CacheCommand], None]
    ) -> CacheAnswer:
        answer: asyncio.Future[CacheAnswer] = asyncio.get_running_loop().create_future()
        self._commands.append(answer)
        send(command)
        return await answer

    def get(self, request_id: int) -> Stream:
        """Return the open stream of that id. Raises `KeyError`."""
        return self._open[request_id]

    def __len__(self) -> int:
        return len(self._open)

    def renew(self, stream: Stream) -> None:
        """Give a stream another id, so that messages on their way under the old one are dropped."""
        del self._open[stream.request_id]
        stream.request_id = next(self._ids)
        stream.is_given = stream.has_begun = False
        self._open[stream.request_id] = stream

    def begin(self, begun: Begun) -> None:
        """Note the requests that may cause a crash from now on."""
        for request_id in begun.request_ids:
            if request_id in self._open:
                self._open[request_id].has_begun = True

    def dispatch(self, result: StepResult) -> None:
        """Distribute a step's columns to their streams; those of closed streams are dropped."""
        self.engine_stats = result.stats
        streams = self._open
        for started in result.started:
            if started.request_id in streams:
                streams[started.request_id].start(started)
        for request_id, scores in result.prompt_logprobs:
            if request_id in streams:
                streams[request_id].add_scores(scores)
        self._dispatch_tokens(result)
        self._dispatch_ends(result)
        for pinned in result.pinned:
            if pinned.request_id in streams:
                streams[pinned.request_id].pin(pinned)
        for answer in result.cache_answers[: len(self._commands)]:
            # A caller that left cancelled it.
            with suppress(asyncio.InvalidStateError):
                self._commands.popleft().set_result(answer)
        if result.num_step_tokens:
            for observe in self._observers:
                observe(result.num_step_tokens)

    def _dispatch_tokens(self, result: StepResult) -> None:
        streams = self._open
        for request_id, num_offered, num_accepted in result.drafts:
            if request_id in streams:
                streams[request_id].add_drafts(num_offered, num_accepted)
        logprobs = result.logprobs or repeat(None)
        for request_id, token_id, logprob in zip(
            result.request_ids, result.token_ids, logprobs, strict=False
        ):
            if request_id in streams:
                streams[request_id].add_token(token_id, logprob)

    def _dispatch_ends(self, result: StepResult) -> None:
        streams = self._open
        for refused in result.rejected:
            if refused.request_id in streams:
                error = RequestRefusedError(refused.message, refused.kind, refused.param)
                streams[refused.request_id].fail(error)
        for request_id, reason in result.finished:
            if request_id in streams:
                streams[request_id].finish(reason)
        for request_id, message in result.failed:
            if request_id in streams:
                streams[request_id].fail(EngineFaultError(message))

    def unfinished(self) -> list[Stream]:
        """Return the streams that still need an engine, in the order they were opened."""
        streams = [stream for stream in self._open.values() if not stream.is_over]
        return sorted(streams, key=lambda stream: stream.arrival)

    def fail_commands(self, message: str) -> None:
        """End all waiting cache commands with an error."""
        while self._commands:
            with suppress(asyncio.InvalidStateError):
                self._commands.popleft().set_exception(EngineUnavailableError(message))

    def close(self, kind: type[EngineError], message: str) -> None:
        """End every open stream and cache command, and every later stream, with an error."""
        self._end = self._end or (kind, message)
        for stream in self.unfinished():
            stream.fail(kind(message))
        self.fail_commands(message)

    def check(self) -> None:
        """Assert that streams are stored under their own ids."""
        for request_id, stream in self._open.items():
            assert stream.request_id == request_id, "a stream under another's id"
