"""Answers of the Responses API: the types of the JSON that is sent.

/openapi.json is made from the same types. Knows nothing of how an answer is generated.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from server.answer_types import Document, ErrorDetail, LeftOutReport, Octavo, TokenLogprob

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(Document):
    """Text for the reader."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: NotRequired[list[TokenLogprob]]


class ReasoningText(Document):
    """Text the model wrote for itself."""

    type: Literal["reasoning_text"]
    text: str


class SummaryText(Document):
    """A summary that a client sent."""

    type: Literal["summary_text"]
    text: str


class InputText(Document):
    """Text for the model."""

    type: Literal["input_text"]
    text: str


class Refusal(Document):
    """A refusal that a client sent."""

    type: Literal["refusal"]
    refusal: str


class OutputMessage(Document):
    """A message of the model."""

    id: str
    type: Literal["message"]
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class ReasoningOutput(Document):
    """Reasoning before the message."""

    id: str
    type: Literal["reasoning"]
    status: Status
    summary: list[SummaryText]
    content: list[ReasoningText | SummaryText]


class Namespace(Document):
    """The namespace of a called tool, if it has one."""

    namespace: NotRequired[str]


class FunctionCallOutput(Namespace):
    """A call of a tool: `arguments` is a string of JSON."""

    id: str
    type: Literal["function_call"]
    status: Status
    call_id: str
    name: str
    arguments: str


class CustomCallOutput(Namespace):
    """A call of a custom tool: `input` is a text."""

    id: str
    type: Literal["custom_tool_call"]
    status: Status
    call_id: str
    name: str
    input: str


class AnyMessage(Document):
    """A message of a conversation."""

    id: str
    type: Literal["message"]
    status: Status
    role: Literal["user", "assistant", "system", "developer"]
    content: list[InputText | OutputText | Refusal]


class ToolResult(Document):
    """The result of a called tool."""

    id: str
    type: Literal["function_call_output", "custom_tool_call_output"]
    status: Status
    call_id: str
    output: str | list[InputText | Refusal]


OutputItem = OutputMessage | ReasoningOutput | FunctionCallOutput | CustomCallOutput


class CacheWriteDetails(Document):
    """The tokens before breakpoints, by their lifetime."""

    ttl_30m_tokens: int
    ttl_12h_tokens: int


class InputTokensDetails(Document):
    """Of the input's tokens: those found in the cache, and those computed into it.

    Written are those before the last breakpoint; without caching options, all that were computed.
    """

    cached_tokens: int
    cache_write_tokens: int
    cache_write_tokens_details: NotRequired[CacheWriteDetails]


class OutputTokensDetails(Document):
    """Of the output's tokens."""

    reasoning_tokens: int


class ResponseUsage(Document):
    """Tokens that went in and came out."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Document):
    """Why there is no more."""

    reason: Literal["max_output_tokens"]


class ResponseFailure(Document):
    """Why a response failed."""

    code: str
    message: str


class ResponseOctavo(LeftOutReport, Octavo):
    """Details that OpenAI's API has no fields for."""


class CacheOptions(Document):
    """The settings of the request for the prompt cache."""

    mode: Literal["implicit", "explicit"]
    ttl: Literal["30m", "12h"]


CacheMissReason = Literal[
    "model_changed", "tools_changed", "input_changed", "reasoning_effort_changed"
]


class CacheDiagnostics(Document):
    """The part of the request that changed since the response it names; see operations.md."""

    type: Literal["cache_hit", "cache_miss", "comparison_response_not_found", "unavailable"]
    #: The rest only of a miss. Missed are all tokens behind the first change.
    reason: NotRequired[CacheMissReason]
    cache_missed_tokens: NotRequired[int]
    comparison_reusable_tokens: NotRequired[int]


class ReasoningSettings(Document):
    """The settings of the request."""

    effort: str | None
    summary: None


class ResponseShell(Document):
    """A response without its output; `usage` and `octavo` come with its end."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    prompt_cache_options: CacheOptions | None
    #: Of requests that name an earlier response.
    prompt_cache_diagnostics: NotRequired[CacheDiagnostics]
    prompt_cache_retention: Literal["in_memory", "24h"] | None
    reasoning: ReasoningSettings
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    metadata: dict[str, str]
    octavo: NotRequired[ResponseOctavo]


class ResponseBody(ResponseShell):
    """A response; `usage` and `octavo` come with its end."""

    output: list[OutputItem]


EventType = Literal[
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.reasoning_text.delta",
    "response.reasoning_text.done",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.custom_tool_call_input.delta",
    "response.custom_tool_call_input.done",
    "response.output_item.done",
    "response.completed",
    "response.incomplete",
    "response.failed",
    "error",
]


class EventFields(Document):
    """An event of a streamed response, before it has a number."""

    type: EventType
    response: NotRequired[ResponseBody]
    output_index: NotRequired[int]
    content_index: NotRequired[int]
    item_id: NotRequired[str]
    item: NotRequired[OutputItem]
    part: NotRequired[OutputText | ReasoningText]
    delta: NotRequired[str]
    text: NotRequired[str]
    logprobs: NotRequired[list[TokenLogprob]]
    name: NotRequired[str]
    arguments: NotRequired[str]
    input: NotRequired[str]
    code: NotRequired[str | None]
    message: NotRequired[str]
    param: NotRequired[str | None]
    error: NotRequired[ErrorDetail]


class ResponseEvent(EventFields):
    """An event of a streamed response; which fields it has depends on its type."""

    sequence_number: int


class DeletedResponse(Document):
    """Answer of `DELETE /v1/responses/{id}`."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItems(Document):
    """Answer of `GET /v1/responses/{id}/input_items`."""

    object: Literal["list"]
    data: list[AnyMessage | ToolResult | FunctionCallOutput | CustomCallOutput | ReasoningOutput]
    first_id: str | None
    last_id: str | None
    has_more: bool
