"""The interface to an engine, in its own process or in the same one.

Knows nothing of HTTP or text. `scheduler/process.py` implements this over a pipe,
tests in the same process (`tests/support/inline_client.py`); one contract suite runs over both.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from cache.pins import LIFETIMES_S, PinEnd, PrefixPin
from cache.selection import Selection
from cache.stats import CacheStats
from cache.view import FULL_VIEW, View
from model.interface import ModelInfo, SamplingParams, TokenLogprobs, Vocabulary
from scheduler.cache_story import CacheStory
from scheduler.messages import (
    CacheCommand,
    ExplainPrefix,
    FinishReason,
    GenerateRequest,
    Pinned,
    PinPrefix,
    RejectKind,
    Started,
    TokenOutput,
    UnpinPrefix,
)
from scheduler.stats import EngineStats, SchedulerStats

#: All types of the interface, so that callers import them from one place.
__all__ = [
    "FULL_VIEW",
    "LIFETIMES_S",
    "CacheCommand",
    "CacheStats",
    "CacheStory",
    "EngineClient",
    "EngineError",
    "EngineFaultError",
    "EngineStats",
    "EngineUnavailableError",
    "ExplainPrefix",
    "FinishReason",
    "GenerateRequest",
    "ModelInfo",
    "PinEnd",
    "PinPrefix",
    "Pinned",
    "PrefixPin",
    "RejectKind",
    "RequestRefusedError",
    "SamplingParams",
    "SchedulerStats",
    "Selection",
    "Started",
    "TokenLogprobs",
    "TokenOutput",
    "UnpinPrefix",
    "View",
    "Vocabulary",
]


class EngineError(Exception):
    """Anything that keeps a request from its tokens. The message is meant for the caller."""


class RequestRefusedError(EngineError):
    """The engine will not run this request, never or not now (see `kind`)."""

    def __init__(self, message: str, kind: RejectKind, param: str | None) -> None:
        super().__init__(message)
        self.kind = kind
        self.param = param


class EngineFaultError(EngineError):
    """A bug on our side ended this request; others go on."""


class EngineUnavailableError(EngineError):
    """The engine ended or has not started; `retry_after_s`: until it should be up, if known."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineClient(Protocol):
    """One engine. All methods are for the one event loop the client was started on."""

    @property
    def info(self) -> ModelInfo:
        """The model served. Raises `EngineUnavailableError` before `start` has returned."""

    @property
    def is_alive(self) -> bool:
        """Whether a request sent now would be served."""

    async def start(self) -> None:
        """Bring the engine up. Raises `EngineUnavailableError` with the reason if it can't."""

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Send the bytes of all tokens; needed once, before the first grammar."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        """Yield outputs until one has a `finish_reason`. Closing the generator cancels the request.

        Raises (from the first iteration on) `RequestRefusedError`, `EngineFaultError`,
        `EngineUnavailableError`.
        """

    async def reset_cache(self) -> int:
        """Forget every cached page that no sequence uses; return how many there were.

        Raises `EngineUnavailableError`.
        """

    async def change_cache(self, command: CacheCommand) -> int:
        """Pin or unpin the cached pages of a prompt; return the answer (see the commands).

        Raises `EngineUnavailableError`.
        """

    async def explain_cache(self, command: ExplainPrefix) -> CacheStory:
        """Look up the reuse of a prompt and the reasons of the rest; change nothing.

        Raises `EngineUnavailableError`.
        """

    def stats(self) -> EngineStats:
        """Return the newest snapshot the engine sent."""

    def on_step(self, observer: Callable[[int], None]) -> None:
        """Call `observer(num_step_tokens)` after each step: for a histogram of step sizes."""

    async def close(self) -> None:
        """End the engine and abort running requests. Draining is up to the caller."""
