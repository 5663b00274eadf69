"""What /openapi.json says of responses: checked against real ones by a test, never used to send.

Knows nothing of how a response comes about.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length"]


class Document(BaseModel):
    """Closed: a field that is sent and not described here is an error in the test."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Document):
    """What went wrong."""

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


class Usage(Document):
    """Tokens that went in and came out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ParamWarning(Document):
    """A parameter that was not honoured."""

    param: str
    message: str


class Timings(Document):
    """How long what took; null where it never came to it."""

    queue_ms: float | None
    ttft_ms: float | None
    total_ms: float
    decode_tokens_per_s: float | None


class CacheReport(Document):
    """How much of the prompt was reused, and why not more."""

    reused_tokens: int
    miss_reason: str | None


class Octavo(Document):
    """What other servers do not tell."""

    warnings: list[ParamWarning]
    timings: Timings
    cache: CacheReport


class TopLogprob(Document):
    """A token and its natural-log probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token that was chosen, and those likelier or likely."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Document):
    """One entry a token."""

    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(Document):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Document):
    """The only one."""

    index: Literal[0]
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Document):
    """Answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    octavo: Octavo


class MessageDelta(Document):
    """What comes to the message."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChatChunkChoice(Document):
    """The only one."""

    index: Literal[0]
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Document):
    """An event of a streamed chat; `octavo` stands in the last, `usage` where it was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    octavo: Octavo | None = None


class CompletionLogprobs(Document):
    """Parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Document):
    """The only one; in a stream, what comes to it."""

    index: Literal[0]
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(Document):
    """Answer of `POST /v1/completions`, whole or an event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    octavo: Octavo | None = None


class ModelCard(Document):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Document):
    """Answer of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(Document):
    """Answer of `POST /tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(Document):
    """Answer of `POST /detokenize`."""

    prompt: str


class Health(Document):
    """Answer of the probes."""

    status: str


class Version(Document):
    """Answer of `GET /version`."""

    version: str
