"""Answers of Anthropic's Messages API: the types of the JSON that is sent.

/openapi.json is made from the same types. Knows nothing of how an answer is generated.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypeAliasType

from server.answer_types import Document, ErrorDetail, LeftOutReport, Octavo, ParamWarning

StopReason = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]


class MessagesErrorBody(Document):
    """Every answer other than success; in a stream, the event `error`, which is the last."""

    type: Literal["error"]
    error: ErrorDetail
    request_id: str


class WrittenText(Document):
    """Text for the reader."""

    type: Literal["text"]
    text: str


class WrittenThinking(Document):
    """Text the model wrote for itself."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class WrittenToolUse(Document):
    """A call of a tool, to be answered by a `tool_result`."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


WrittenBlock = Annotated[
    WrittenText | WrittenThinking | WrittenToolUse, Field(discriminator="type")
]


class CacheCreation(Document):
    """The tokens of `cache_creation_input_tokens` by the lifetime of their breakpoint."""

    ephemeral_5m_input_tokens: int
    ephemeral_1h_input_tokens: int


class MessageUsage(Document):
    """Tokens: the prompt's are the sum of the first three.

    Read: found in the cache. Creation: computed, before the last breakpoint; of a request without
    one, computed into whole pages of the cache. Input: the others.
    """

    input_tokens: int
    cache_creation_input_tokens: int
    cache_creation: CacheCreation
    cache_read_input_tokens: int
    output_tokens: int


class ReasoningReport(LeftOutReport):
    """Fields that only some answers have."""

    #: Of the output's tokens; only of models that reason.
    reasoning_tokens: NotRequired[int]


class MessageReport(ReasoningReport, Octavo):
    """Details that Anthropic's API has no fields for."""


CacheMissType = Literal[
    "model_changed",
    "system_changed",
    "tools_changed",
    "messages_changed",
    "previous_message_not_found",
    "unavailable",
]


class CacheMissReason(Document):
    """The part of a request that differs from the earlier one."""

    type: CacheMissType
    #: Tokens that could have been reused otherwise; only of the types `*_changed`.
    cache_missed_input_tokens: NotRequired[int]


class Diagnostics(Document):
    """Why the prompt of an earlier message could not be reused."""

    cache_miss_reason: CacheMissReason


class MessageEnd(Document):
    """Why it ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageAnswer(Document):
    """Answer of `POST /v1/messages`; in a stream, `message_start` has one that is empty yet."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[WrittenBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    #: Of requests with `diagnostics`; null: nothing differs, or there was nothing to compare.
    diagnostics: NotRequired[Diagnostics | None]
    octavo: NotRequired[MessageReport]


class MessageStart(Document):
    """The first event."""

    type: Literal["message_start"]
    message: MessageAnswer


class Ping(Document):
    """An event without content."""

    type: Literal["ping"]


class BlockStart(Document):
    """A block begins, empty."""

    type: Literal["content_block_start"]
    index: int
    content_block: WrittenBlock


class TextDelta(Document):
    """More text."""

    type: Literal["text_delta"]
    text: str


class ThinkingDelta(Document):
    """More thoughts."""

    type: Literal["thinking_delta"]
    thinking: str


class InputDelta(Document):
    """More of a call's input, a string of JSON."""

    type: Literal["input_json_delta"]
    partial_json: str


Delta = Annotated[TextDelta | ThinkingDelta | InputDelta, Field(discriminator="type")]


class BlockDelta(Document):
    """An addition to the block."""

    type: Literal["content_block_delta"]
    index: int
    delta: Delta


class BlockStop(Document):
    """The block is complete."""

    type: Literal["content_block_stop"]
    index: int


class MessageEndDelta(Document):
    """The last event but one."""

    type: Literal["message_delta"]
    delta: MessageEnd
    usage: MessageUsage
    octavo: MessageReport


class MessageStop(Document):
    """The last event."""

    type: Literal["message_stop"]


BlockEvent = BlockStart | BlockDelta | BlockStop
#: An event of a streamed answer; its SSE event is named as its `type`.
MessageEvent = TypeAliasType(
    "MessageEvent",
    Annotated[
        MessageStart | Ping | BlockEvent | MessageEndDelta | MessageStop | MessagesErrorBody,
        Field(
            discriminator="type",
            description="An event of a streamed answer; its SSE event is named as its `type`.",
        ),
    ],
)


class CountReport(Document):
    """Details that Anthropic's API has no fields for."""

    warnings: list[ParamWarning]


class TokenCount(Document):
    """Answer of `POST /v1/messages/count_tokens`."""

    input_tokens: int
    octavo: CountReport
