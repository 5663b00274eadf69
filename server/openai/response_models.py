"""What /openapi.json says of responses: checked against real ones by a test, never used to send.

Knows nothing of how a response comes about.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


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


class CompletionTokensDetails(Document):
    """Of the answer's tokens; only of models that reason."""

    reasoning_tokens: int


class Usage(Document):
    """Tokens that went in and came out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None


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


class CalledFunction(Document):
    """A tool and its arguments, a string of JSON."""

    name: str
    arguments: str


class PromptCandidate(Document):
    """A token that stands at one place of the prompt, or could have; `rank` 1: the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


#: By token id, the prompt's own first; null for the prompt's first token.
PromptLogprobs = list[dict[str, PromptCandidate] | None]


class CalledCustom(Document):
    """A custom tool and its input, a text."""

    name: str
    input: str


class ToolCall(Document):
    """A call of a tool: which of the two fields it has depends on its type."""

    id: str
    type: Literal["function", "custom"]
    function: CalledFunction | None = None
    custom: CalledCustom | None = None


class FunctionDelta(Document):
    """The tool, in a call's first delta, and what comes to its arguments."""

    name: str | None = None
    arguments: str


class CustomDelta(Document):
    """The tool, in a call's first delta, and then its whole input."""

    name: str | None = None
    input: str


class ToolCallDelta(Document):
    """What comes to a call; `id` and `type` stand in its first delta."""

    index: int
    id: str | None = None
    type: Literal["function", "custom"] | None = None
    function: FunctionDelta | None = None
    custom: CustomDelta | None = None


class LeftOut(Document):
    """What the model wrote and the message does not hold.

    Where there is a `cut_tool_call`, a call is incomplete; it is the part that no call shows.
    """

    num_tool_calls: int | None = None
    cut_tool_call: str | None = None


class ChoiceReport(Document):
    """Our own object of a choice, where there is something to tell."""

    left_out: LeftOut


class AssistantMessage(Document):
    """The answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Document):
    """One of `n`."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    octavo: ChoiceReport | None = None
    token_ids: list[int] | None = None


class ChatCompletion(Document):
    """Answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    usage: Usage
    octavo: Octavo


class MessageDelta(Document):
    """What comes to the message."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Document):
    """What comes to one of `n`."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    octavo: ChoiceReport | None = None
    token_ids: list[int] | None = None


class ChatChunk(Document):
    """An event of a streamed chat; `octavo` stands in the last, `usage` where it was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    prompt_token_ids: list[int] | None = None
    usage: Usage | None = None
    octavo: Octavo | None = None


class CompletionLogprobs(Document):
    """Parallel lists, one entry a token; null of the first token of a prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Document):
    """Answer `index % n` to prompt `index // n`; in a stream, what comes to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


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
    #: What requests get that do not say otherwise, by its parameter.
    sampling_defaults: dict[str, float]


class ModelList(Document):
    """Answer of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class WordsReport(Document):
    """What of the request had no effect; not there if all had."""

    warnings: list[ParamWarning]


class Tokenized(Document):
    """Answer of `POST /tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None
    octavo: WordsReport | None = None


class TokenizerInfo(BaseModel):
    """What tokenizer_config.json holds; special tokens have fields of their names."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str
    #: One, or a list of objects with `name` and `template`.
    chat_template: str | list[dict[str, str]] | None = None


class CacheReset(Document):
    """Answer of `POST /reset_prefix_cache`."""

    freed_pages: int


class Detokenized(Document):
    """Answer of `POST /detokenize`."""

    prompt: str
    #: The same, for clients of llama-server.
    content: str
    octavo: WordsReport | None = None


class Health(Document):
    """Answer of the probes."""

    status: str


class Version(Document):
    """Answer of `GET /version`."""

    version: str
