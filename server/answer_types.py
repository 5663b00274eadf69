"""JSON objects that the answers of several APIs contain; /openapi.json is made from the same types.

Imports nothing of ours.
"""

from __future__ import annotations

from typing import Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict


@with_config(ConfigDict(extra="forbid"))
class Document(TypedDict):
    """The base of all objects that are sent: none has fields that its type does not list."""


class ErrorDetail(Document):
    """The reason of a failure."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Document):
    """Every answer other than success; in a stream, one event before `[DONE]`."""

    error: ErrorDetail


class PromptTokensDetails(Document):
    """Of the prompt's tokens."""

    cached_tokens: int
    #: Computed, and before a breakpoint; of requests that ask for prompt caching.
    cache_write_tokens: NotRequired[int]


class CompletionTokensDetails(Document):
    """Of the answer's tokens: of models that reason, and where drafts were verified."""

    reasoning_tokens: NotRequired[int]
    #: Of all drafts, whether of the request's `prediction` or not.
    accepted_prediction_tokens: NotRequired[int]
    rejected_prediction_tokens: NotRequired[int]


class Usage(Document):
    """Tokens that went in and came out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: NotRequired[CompletionTokensDetails]


class ParamWarning(Document):
    """A parameter that was not honoured."""

    param: str
    message: str


class Timings(Document):
    """Durations of a request's stages; null if it never reached the stage."""

    queue_ms: float | None
    ttft_ms: float | None
    total_ms: float
    decode_tokens_per_s: float | None


class Divergence(Document):
    """The first token of a prompt that differs from the cached ones, and the prompt around it."""

    token: int
    #: Of the field that has the token.
    path: str
    before: str
    after: str


class Evicted(Document):
    """The eviction of the first page that is missing."""

    #: room, pin_lapsed, reset or fault.
    cause: str
    age_s: float


class Comparison(Document):
    """The request beside an earlier one, which it names."""

    #: Whether it is still known, and of the same API key.
    is_found: bool
    #: The first changed part: tools, system, messages, or the name of a setting. Null: none.
    changed: str | None
    #: Of the part, where it is in the body.
    path: str | None
    #: Tokens that both begin with, in steps of 16.
    reusable_tokens: int
    #: Tokens of the earlier prompt that could have been reused, had the part not changed.
    missed_tokens: int


class CacheReport(Document):
    """How much of the prompt was reused, and why not more."""

    reused_tokens: int
    #: Of the first token that was not reused.
    miss_reason: str | None
    #: By reason. With the reused ones they are all tokens of the prompt but its last.
    missed_tokens: dict[str, int]
    #: Of a single prompt.
    diverged_at: NotRequired[Divergence]
    evicted: NotRequired[Evicted]
    #: Of requests that name an earlier one.
    compared: NotRequired[Comparison]


class SpeculationReport(Document):
    """Tokens of the drafts that were verified, and of the accepted ones."""

    offered: int
    accepted: int


class KVReport(Document):
    """The policy that the answer was generated under, and its keys, of all choices together.

    At the end, `held_tokens` were in view and `dropped_tokens` were not.
    """

    policy: Literal["window", "sinks", "morph", "h2o"]
    window: int
    #: Of `window` and `sinks`.
    sinks: NotRequired[int]
    #: Of `morph` and `h2o`.
    capacity: NotRequired[int]
    #: Of `morph`.
    fusion: NotRequired[Literal["sum", "max"]]
    held_tokens: int
    dropped_tokens: int


class Octavo(Document):
    """Details that OpenAI's API has no fields for."""

    warnings: list[ParamWarning]
    timings: Timings
    cache: CacheReport
    speculation: NotRequired[SpeculationReport]
    #: Where not all keys are kept.
    kv: NotRequired[KVReport]


class Report(Document):
    """The end of a whole answer."""

    usage: Usage
    octavo: Octavo


class StreamReport(Document):
    """The end of a streamed answer: empty while other choices go on."""

    usage: NotRequired[Usage]
    octavo: NotRequired[Octavo]


class LeftOut(Document):
    """Output of the model that the message does not contain.

    Where there is a `cut_tool_call`, a call is incomplete; it is the part that no call contains.
    """

    num_tool_calls: NotRequired[int]
    cut_tool_call: NotRequired[str]


class LeftOutReport(Document):
    """The part of an `octavo` object for output that the answer does not contain."""

    left_out: NotRequired[LeftOut]


class TopLogprob(Document):
    """A token and its natural-log probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token that was chosen, and those likelier or likely."""

    top_logprobs: list[TopLogprob]


class PromptCandidate(Document):
    """A token that stands at one place of the prompt, or could have; `rank` 1: the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


#: By token id, the prompt's own first; null for the prompt's first token.
PromptLogprobs = list[dict[str, PromptCandidate] | None]


class CompletionLogprobs(Document):
    """Parallel lists, one entry a token; null of the first token of a prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
