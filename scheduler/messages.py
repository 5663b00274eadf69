"""The messages between the API process and the engine process: frozen, picklable.

Knows nothing of how a message travels, of HTTP or of text. Engine to API there is one message a
step, and it is columnar: parallel tuples of ids and tokens cost a sixth of as many small objects
to pickle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, TypeAlias

from cache.pins import PrefixPin
from cache.selection import Selection
from cache.view import FULL_VIEW, View
from configs.kv_disk import KVDisk
from configs.schema import SchedulerSection
from model.interface import ModelInfo, ModelRunner, SamplingParams, TokenLogprobs, Vocabulary
from scheduler.cache_story import NO_STORY, CacheStory
from scheduler.stats import EngineStats


class FinishReason(StrEnum):
    """Why a request ended. `STOP` and `LENGTH` are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RejectKind(StrEnum):
    """The kind of a refusal: the request can never be served, or not now."""

    INVALID = "invalid"
    BUSY = "busy"


# ---- API to engine -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Build:
    """The first message: what to serve. Both functions are pickled and called in the engine.

    `prepare` is called first, such as to give log lines their format. `disk`: of the disk tier.
    """

    make_runner: Callable[[], ModelRunner]
    config: SchedulerSection
    prepare: Callable[[], None] | None = None
    disk: KVDisk | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A request for tokens, as the API passes it to an `EngineClient`."""

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    #: Smaller goes first, as in vLLM; first come, first served within one priority.
    priority: int = 0
    #: Prefixes are shared only within one namespace: of the API key and the `cache_salt`.
    namespace: str = ""
    #: Text that the output may repeat (OpenAI's `prediction`), for drafts.
    prediction_token_ids: tuple[int, ...] = ()
    #: Whether drafts may be verified for it. They change its speed alone.
    may_speculate: bool = True
    #: The keys that its queries read, at most those in the model's own view.
    view: View = FULL_VIEW
    #: Where it keeps a fixed number of keys: the way to choose them. Its view is then the full one.
    selection: Selection | None = None
    #: Beginnings of the prompt to be kept, the shortest first, and whose quota they count in.
    pins: tuple[PrefixPin, ...] = ()
    owner: str = ""
    #: Of prompt and answer, the tokens that may stay cached; None: all of them.
    store_up_to: int | None = None


@dataclass(frozen=True, slots=True)
class Submit:
    """A request, new or resumed by another engine than the one that first accepted it."""

    request_id: int
    request: GenerateRequest
    #: Tokens that the client already has.
    output_token_ids: tuple[int, ...] = ()
    #: Prompt tokens whose logprobs the client already has.
    num_scored: int = 0
    #: Accepted before, so a full queue must not refuse it.
    is_resumed: bool = False

    @property
    def num_tokens(self) -> int:
        """Known tokens of prompt and output."""
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)


@dataclass(frozen=True, slots=True)
class Cancel:
    """End a request whose reader has left. Ids of unknown and finished requests are fine."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Stop after the current step and abort running requests. Draining is up to the API."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Ask the loop that runs the steps for a `Pong`, so that a hang shows without a request."""


@dataclass(frozen=True, slots=True)
class SetVocabulary:
    """The bytes of all tokens. Sent to each engine once, before the first grammar."""

    vocabulary: Vocabulary


@dataclass(frozen=True, slots=True)
class ResetCache:
    """Forget every cached page that no sequence uses; `StepResult.cache_answers` answers."""


@dataclass(frozen=True, slots=True)
class PinPrefix:
    """Pin the cached pages of a prompt; the answer is how many they are, 0 where it is refused."""

    token_ids: tuple[int, ...]
    namespace: str
    owner: str
    lifetime: str


@dataclass(frozen=True, slots=True)
class UnpinPrefix:
    """End the pins that end within the pages of a prompt; the answer is how many."""

    token_ids: tuple[int, ...]
    namespace: str


@dataclass(frozen=True, slots=True)
class ExplainPrefix:
    """Look up the reuse of a prompt; the answer is a `CacheStory`. Changes nothing."""

    token_ids: tuple[int, ...]
    namespace: str


#: Are answered in their order.
CacheCommand: TypeAlias = ResetCache | PinPrefix | UnpinPrefix | ExplainPrefix
#: A number, or the story of an `ExplainPrefix`.
CacheAnswer: TypeAlias = int | CacheStory


@dataclass(frozen=True, slots=True)
class Prepared:
    """A grammar is compiled or refused. Posted by the compiling thread, so no polling is needed."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """Pages for a request were read, or its time to wait for them is over. Posted by threads."""

    request_id: int


ToEngine: TypeAlias = Build | Submit | Cancel | SetVocabulary | Ping | CacheCommand | Shutdown


# ---- engine to API -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begun:
    """The engine is about to do something for these requests for the first time.

    Sent first, so a crash can be blamed on these requests and not on waiting ones. Later steps of
    the same requests are not announced.
    """

    request_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Started:
    """A request left the queue. Sent once, with its first admission."""

    request_id: int
    queue_s: float
    cached_tokens: int
    story: CacheStory = NO_STORY


class Pinned(NamedTuple):
    """The effect of a request's pins. Sent once, when its prompt is computed."""

    request_id: int
    #: Pins that were not set: more would have been pinned than may be.
    num_refused: int
    #: Older pins that ended for them.
    num_displaced: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """A request that will not run. No other message about it follows."""

    request_id: int
    kind: RejectKind
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """All news of one step, or of one batch of messages. Columns are parallel lists."""

    stats: EngineStats = field(default_factory=EngineStats)
    #: One entry a token: a request may stand here more than once, in order.
    request_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    #: Empty where no request asked for logprobs.
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    #: (request id, the next tokens of its prompt): before its first token, all of them.
    prompt_logprobs: list[tuple[int, tuple[TokenLogprobs, ...]]] = field(default_factory=list)
    started: list[Started] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    #: (request id, reason), after the request's last token in this message.
    finished: list[tuple[int, FinishReason]] = field(default_factory=list)
    #: (request id, message): ended by an error of its own.
    failed: list[tuple[int, str]] = field(default_factory=list)
    #: (request id, draft tokens that were verified, those of them that were accepted).
    drafts: list[tuple[int, int, int]] = field(default_factory=list)
    #: Pages that each `ResetCache` freed, pages or pins that each `PinPrefix` or `UnpinPrefix`
    #: changed, or the story of an `ExplainPrefix`.
    cache_answers: list[CacheAnswer] = field(default_factory=list)
    #: Of the prompts that were computed: which of their pins hold, and the pins ended for them.
    pinned: list[Pinned] = field(default_factory=list)
    #: Tokens the step computed, prompt and decode together; 0 without a step.
    num_step_tokens: int = 0

    def add_tokens(
        self, request_id: int, token_ids: list[int], logprobs: list[TokenLogprobs] | None
    ) -> None:
        """Add the next tokens of a request; `logprobs` is None where no request has any."""
        self.request_ids.extend([request_id] * len(token_ids))
        self.token_ids.extend(token_ids)
        if logprobs is not None:
            self.logprobs.extend(logprobs[: len(token_ids)] or [None] * len(token_ids))


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """News of one request since the last output; several tokens if the reader is slow."""

    token_ids: tuple[int, ...] = ()
    #: Parallel to `token_ids`, or empty where the request has none.
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    #: In the first output after admission.
    started: Started | None = None
    #: In the last output only.
    finish_reason: FinishReason | None = None
    #: Of the prompt's tokens but the first, if asked for: all of them in the first output that has
    #: a token or a reason.
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    #: Tokens of drafts that were verified, and those of them that were accepted.
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    #: Of a request with pins, once.
    pinned: Pinned | None = None


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
