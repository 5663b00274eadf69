"""Answers of chats, completions and the routes about the model: the types of the JSON that is sent.

/openapi.json is made from the same types. Knows nothing of how an answer is generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from server.answer_types import (
    CacheReport,
    CompletionLogprobs,
    Document,
    LeftOut,
    Octavo,
    ParamWarning,
    PromptLogprobs,
    TokenLogprob,
    Usage,
)

FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


class ChatLogprobs(Document):
    """One entry a token."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(Document):
    """A tool and its arguments, a string of JSON."""

    name: str
    arguments: str


class CalledCustom(Document):
    """A custom tool and its input, a text."""

    name: str
    input: str


class ToolCall(Document):
    """A call of a tool: which of the two fields it has depends on its type."""

    id: str
    type: Literal["function", "custom"]
    function: NotRequired[CalledFunction]
    custom: NotRequired[CalledCustom]


class FunctionDelta(Document):
    """The tool, in a call's first delta, and an addition to its arguments."""

    name: NotRequired[str]
    arguments: str


class CustomDelta(Document):
    """The tool, in a call's first delta, and then its whole input."""

    name: NotRequired[str]
    input: str


class ToolCallDelta(Document):
    """An addition to a call; `id` and `type` stand in its first delta."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function", "custom"]]
    function: NotRequired[FunctionDelta]
    custom: NotRequired[CustomDelta]


class ChoiceReport(Document):
    """Our own object of a choice, where there is something to report."""

    left_out: LeftOut


class AssistantMessage(Document):
    """The answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class TokenIds(Document):
    """The tokens of a choice, on request."""

    token_ids: NotRequired[list[int]]


class ChoiceDetails(TokenIds):
    """Fields that only some choices have."""

    octavo: NotRequired[ChoiceReport]


class ChatChoice(ChoiceDetails):
    """One of `n`."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason


class PromptDetails(Document):
    """The prompt's tokens, on request."""

    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class ChatCompletion(PromptDetails):
    """Answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    octavo: Octavo


class MessageDelta(Document):
    """An addition to the message."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChatChunkChoice(ChoiceDetails):
    """An addition to one of `n`."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None


class ChatChunk(Document):
    """An event of a streamed chat; `octavo` stands in the last, `usage` on request."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    prompt_token_ids: NotRequired[list[int]]
    usage: NotRequired[Usage | None]
    octavo: NotRequired[Octavo]


class CompletionChoice(TokenIds, PromptDetails):
    """Answer `index % n` to prompt `index // n`; in a stream, an addition to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionShell(Document):
    """The part that all events of a stream have in common."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str


class Completion(CompletionShell):
    """Answer of `POST /v1/completions`, whole or an event of its stream."""

    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]
    octavo: NotRequired[Octavo]


class ModelCard(Document):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    #: Parameters of requests that do not set them.
    sampling_defaults: Mapping[str, float]


class ModelList(Document):
    """Answer of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class WordsReport(Document):
    """The request's fields that had no effect; not there if all had."""

    warnings: list[ParamWarning]


class Reported(Document):
    """The part of an answer for warnings."""

    octavo: NotRequired[WordsReport]


class Tokenized(Reported):
    """Answer of `POST /tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: NotRequired[list[str]]


@with_config(ConfigDict(extra="allow"))
class TokenizerInfo(TypedDict):
    """The content of tokenizer_config.json; special tokens have fields of their names."""

    tokenizer_class: str
    #: One, or a list of objects with `name` and `template`.
    chat_template: NotRequired[str | list[dict[str, str]] | None]


class CacheReset(Document):
    """Answer of `POST /admin/cache/reset` and of `POST /reset_prefix_cache`."""

    freed_pages: int


class PrefixPinned(Reported):
    """Answer of `POST /admin/cache/pin`."""

    #: 0: nothing of the prefix is cached, or more would be pinned than may be.
    pinned_pages: int


class PrefixUnpinned(Reported):
    """Answer of `POST /admin/cache/unpin`."""

    ended_pins: int


class CacheExplained(Reported, CacheReport):
    """Answer of `POST /admin/cache/explain`: the reuse of a request that came now."""

    prompt_tokens: int


class Detokenized(Reported):
    """Answer of `POST /detokenize`."""

    prompt: str
    #: The same, for clients of llama-server.
    content: str


class Health(Document):
    """Answer of the probes."""

    status: str


class Version(Document):
    """Answer of `GET /version`."""

    version: str
