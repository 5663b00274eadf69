"""What the API process and the engine process say to each other: frozen, flat, picklable.

Knows nothing of how a message travels, of HTTP or of text. Engine to API there is one message a
step, and it is columnar: parallel tuples of ids and tokens cost a sixth of as many small objects
to pickle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from configs.schema import SchedulerSection
from model.interface import ModelInfo, ModelRunner, SamplingParams, TokenLogprobs, Vocabulary


class FinishReason(StrEnum):
    """Why a request ended. `STOP` and `LENGTH` are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RejectKind(StrEnum):
    """Whose fault a refusal is: the request can never be served, or not now."""

    INVALID = "invalid"
    BUSY = "busy"


# ---- API to engine -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Build:
    """The first message: what to serve. Both functions are pickled and called in the engine.

    `prepare` is called first, such as to give log lines their format.
    """

    make_runner: Callable[[], ModelRunner]
    config: SchedulerSection
    prepare: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Submit:
    """A request for tokens, new or resumed by another engine than the one that took it in."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    #: What its client has already.
    output_token_ids: tuple[int, ...] = ()
    #: Smaller goes first (vLLM's meaning); first come, first served within one priority.
    priority: int = 0
    #: Prefixes are shared only within one namespace (the API key's, with `cache_salt` in it).
    namespace: str = ""
    #: Taken in before, so that a full queue is no reason to refuse it.
    is_resumed: bool = False
    #: Of how many tokens of its prompt the client has been told the probabilities.
    num_scored: int = 0


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for this request any more. Unknown and finished ids are fine: they race."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Stop after the current step; what still runs is aborted. Draining is the API's business."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Ask the loop that runs the steps for a `Pong`, so that a hang shows without a request."""


@dataclass(frozen=True, slots=True)
class Learn:
    """What the tokens say; sent to each engine once, before the first request with a grammar."""

    vocabulary: Vocabulary


@dataclass(frozen=True, slots=True)
class ResetCache:
    """Forget every cached page that no sequence uses; `StepResult.reset_pages` answers."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A grammar is ready, or is known to be none: said within the engine, by the thread that knows.

    So that nobody has to look: the engine sleeps until it is told something.
    """

    request_id: int


ToEngine: TypeAlias = Build | Submit | Cancel | Learn | Ping | ResetCache | Shutdown


# ---- engine to API -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One moment of the engine. Counters (`*_total`) only grow while a process lives."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    #: At least 0: greater only where a request without a priority would displace somebody.
    lowest_waiting_priority: int = 0
    pages_total: int = 0
    #: free + private + cached == total; leased are those of `cached` that something running uses.
    pages_free: int = 0
    pages_private: int = 0
    pages_cached: int = 0
    pages_leased: int = 0
    prefix_queries_tokens_total: int = 0
    prefix_hits_tokens_total: int = 0
    prompt_tokens_computed_total: int = 0
    evicted_pages_total: int = 0
    copied_pages_total: int = 0
    preemptions_total: int = 0
    late_rows_total: int = 0
    faulty_rows_total: int = 0
    steps_total: int = 0


@dataclass(frozen=True, slots=True)
class Begun:
    """The engine is about to do something for these requests for the first time.

    Said before it is done: should the engine die of it, it is known who may be the reason, and that
    those who only waited are not. Nothing is said of the steps that follow.
    """

    request_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Started:
    """A request left the queue (told once, with its first admission)."""

    request_id: int
    queue_s: float
    cached_tokens: int
    #: Why no more was reused, for the person who asks: see `cache.MissReason`.
    miss_reason: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A request that will not run; the only thing its caller ever hears of it."""

    request_id: int
    kind: RejectKind
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """All there is to tell after one step (or one batch of messages). Columns are parallel."""

    stats: EngineStats
    #: One entry a token: a request may stand here more than once, in order.
    request_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    #: Empty where nobody asked for any.
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    #: (request id, the next tokens of its prompt): before its first token, all of them.
    prompt_logprobs: tuple[tuple[int, tuple[TokenLogprobs, ...]], ...] = ()
    started: tuple[Started, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    #: (request id, reason, message or ""): after the request's last token in this message.
    finished: tuple[tuple[int, FinishReason, str], ...] = ()
    #: Tokens the step computed, prompt and decode together; 0 where no step ran.
    num_step_tokens: int = 0
    #: Pages that each `ResetCache` freed.
    reset_pages: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine's first message: the model is built and takes requests."""

    info: ModelInfo


@dataclass(frozen=True, slots=True)
class Pong:
    """The engine's loop is alive."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine's last message: why it could not start or go on, in words for an operator."""

    message: str
    #: The machine lacked memory, processes or files: the same may succeed later.
    is_shortage: bool = False


FromEngine: TypeAlias = Ready | Begun | StepResult | Pong | Failed
