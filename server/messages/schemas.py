"""Bodies of Anthropic's Messages: every field here is honoured.

`server/messages/params.py` judges all other fields. As everywhere, types are strict, and lists
end at their first fault. Knows nothing of chats or of templates.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from server.generation.prompt_messages import MAX_MESSAGES, MAX_PARTS, require_kind
from server.generation.request_fields import GenerateFields, Request, TemplateVariables, optional
from server.http.errors import Path, shortened
from server.text.stop import MAX_STOP_CHARS, MAX_STOPS
from server.tools.schemas import MAX_TOOLS, ToolName


def _known_kinds(*kinds: str) -> Callable[[object], object]:
    """Return a validator that names the kind of a block that is not supported."""

    def require_known(value: object) -> object:
        kind = value.get("type") if isinstance(value, dict) else None
        require_kind(kind, kinds)
        return value

    return require_known


def _as_blocks(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


#: Anthropic's own tools, by their names without the date, and why they are left out.
_RUN_THERE = "it runs on Anthropic's servers, and this one runs no tools"
_TRAINED = "models learn its form for it alone; give it with an input_schema"
LEFT_OUT = {
    **dict.fromkeys(("web_search", "web_fetch", "code_execution", "advisor"), _RUN_THERE),
    **dict.fromkeys(
        ("tool_search_tool_bm25", "tool_search_tool_regex"), "all tools are in the prompt"
    ),
    "mcp_toolset": _RUN_THERE,
    **dict.fromkeys(("bash", "text_editor", "memory", "computer"), _TRAINED),
    **dict.fromkeys(("browser_toolset", "computer_toolset"), _TRAINED),
}
_DATE = re.compile(r"_\d{8}\Z")


def kind_of_tool(name: str) -> str:
    """Return the kind of one of Anthropic's tools, which have a date."""
    return _DATE.sub("", name)


def _as_tool(value: object) -> object:
    """Read a tool as its type says, so that a fault is one of that type alone."""
    kind = value.get("type") if isinstance(value, dict) else None
    is_other = isinstance(kind, str) and kind_of_tool(kind) in LEFT_OUT
    return (AnthropicTool if is_other else InputTool).model_validate(value)


def _as_custom(value: object) -> object:
    if isinstance(value, str) and value != "custom":
        raise ValueError(f"{shortened(value)!r} is not a kind of tool that is known here")
    return value


class CacheControl(Request):
    """The end of a beginning of the prompt that is to be kept."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Request):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


TextBlocks = Annotated[
    Annotated[
        list[Annotated[TextBlock, BeforeValidator(_known_kinds("text"))]],
        Field(max_length=MAX_PARTS, fail_fast=True),
    ],
    BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock]),
]


class ToolUseBlock(Request):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1)]
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None


class ToolResultBlock(Request):
    """The result of a tool."""

    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(min_length=1)]
    content: TextBlocks | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


class ThinkingBlock(Request):
    """Reasoning of the assistant, for templates that support it."""

    type: Literal["thinking"]
    thinking: str
    #: Is not verified: a client can write the same words as text.
    signature: str | None = None


class RedactedThinkingBlock(Request):
    """Thoughts that only their maker can read."""

    type: Literal["redacted_thinking"]
    data: str


Block = TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock
_KINDS = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")
Blocks = Annotated[
    Annotated[
        list[Annotated[Block, Field(discriminator="type"), BeforeValidator(_known_kinds(*_KINDS))]],
        Field(max_length=MAX_PARTS, fail_fast=True),
    ],
    BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block]),
]


class Turn(Request):
    """A message. Neighbours of one role are one message."""

    role: Literal["user", "assistant", "system"]
    content: Blocks


class InputTool(Request):
    """A tool that the client runs."""

    type: Annotated[Literal["custom"] | None, BeforeValidator(_as_custom)] = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: CacheControl | None = None


class AnthropicTool(Request):
    """A tool of Anthropic's, which is left out."""

    type: str


class InputToolChoice(Request):
    """Which tools may or must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = optional("of the type tool")
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _names_a_tool(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("the type tool needs the tool's name, and no other type has one")
        return self


class ThinkingConfig(Request):
    """Whether the model is to think before it answers."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputConfig(Request):
    """How the answer is to be."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class RequestMetadata(Request):
    """About the request."""

    user_id: str | None = None


Tools = Annotated[
    list[
        Annotated[Any, BeforeValidator(_as_tool, json_schema_input_type=InputTool | AnthropicTool)]
    ],
    Field(max_length=MAX_TOOLS, fail_fast=True),
]
Turns = Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
StopSequences = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
    Field(max_length=MAX_STOPS, fail_fast=True),
]


class CountTokensRequest(Request):
    """Body of `POST /v1/messages/count_tokens`."""

    model: str | None = optional("default: the one that is served")
    messages: Turns = Field(
        description="texts, calls, results, thoughts; a last one of the assistant is gone on with"
    )
    system: TextBlocks | None = None
    tools: Tools | None = optional("those with an input_schema; Anthropic's own are left out")
    tool_choice: InputToolChoice | None = optional("default: auto if there are tools")
    thinking: ThinkingConfig | None = optional("default: as the model's template has it")
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = optional(
        "of the last block; 4 in all, with those in tools and blocks; see operations.md"
    )

    @classmethod
    def path_of(cls, location: Path) -> Path:
        """See `Request`. Pydantic puts the kind of a block behind its index; clients do not."""
        is_in_block = location[:1] == ("messages",) and location[4:5] and location[4] in _KINDS
        return (*location[:4], *location[5:]) if is_in_block else location


class DiagnosticsInput(Request):
    """A comparison with an earlier request."""

    previous_message_id: Annotated[str, Field(max_length=256)] | None = None


class MessagesRequest(CountTokensRequest):
    """Body of `POST /v1/messages`."""

    max_tokens: Annotated[int, Field(ge=0)] = Field(
        description="required; what the context has no room for is cut, and warned of;"
        " 0: the prompt is cached, and no answer written"
    )
    temperature: Annotated[float, Field(ge=0, le=1)] | None = optional("0 to 1; default 1")
    top_p: float | None = optional("above 0, at most 1; default 1")
    top_k: int | None = optional("-1, 0 and null: no limit")
    stop_sequences: StopSequences | None = None
    stream: bool | None = None
    diagnostics: DiagnosticsInput | None = optional(
        "names an earlier message: the answer has the part that changed since, and the server keeps"
        " digests of this request, never text"
    )
    metadata: RequestMetadata | None = optional(
        "its `user_id` is warned of: it does not distinguish callers"
    )


class SharedFields(GenerateFields):
    """Parameters of OpenAI's APIs that mean the same here (`server/messages/params.py`)."""

    chat_template_kwargs: TemplateVariables | None = None
