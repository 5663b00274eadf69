"""Items, of which the Responses API makes a conversation, with strict types.

Only text is accepted; other items and parts are refused by the name of their type. Knows nothing of
chats or of what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from server.generation.caching import PromptCacheBreakpoint
from server.generation.prompt_messages import MAX_MESSAGES, MAX_PARTS, require_kind
from server.generation.request_fields import Request, optional
from server.responses.response_models import Status
from server.tools.schemas import ToolName

#: An id, or a similar value that is only stored.
Name = Annotated[str, Field(min_length=1, max_length=256)]


class _Typed(Request):
    #: The values that `type` may have; others are refused by name.
    types: ClassVar[tuple[str, ...]] = ()

    type: str

    @field_validator("type", mode="before")
    @classmethod
    def _is_known(cls, value: object) -> object:
        require_kind(value, cls.types)
        return value


class ItemPart(_Typed):
    """A piece of a message or of a tool's output. Pictures, files and sounds are not supported."""

    types = ("input_text", "output_text", "refusal", "text")

    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: PromptCacheBreakpoint | None = optional(
        "of input_text: the prompt up to here is kept; see operations.md"
    )

    @model_validator(mode="after")
    def _has_words(self) -> Self:
        name = "refusal" if self.type == "refusal" else "text"
        if getattr(self, name) is None:
            raise ValueError(f"a part of the type {self.type} needs {name}")
        if self.prompt_cache_breakpoint is not None and self.type != "input_text":
            raise ValueError(f"a part of the type {self.type} has no prompt_cache_breakpoint")
        return self

    @property
    def words(self) -> str:
        """The text of it, whatever its type."""
        return (self.refusal if self.type == "refusal" else self.text) or ""


class ReasoningPart(_Typed):
    """A piece of reasoning, or of its summary."""

    types = ("reasoning_text", "summary_text")

    text: str


def _as_parts(value: object) -> object:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


Content = Annotated[
    Annotated[list[ItemPart], Field(max_length=MAX_PARTS, fail_fast=True)],
    BeforeValidator(_as_parts, json_schema_input_type=str | list[ItemPart]),
]
ReasoningParts = Annotated[list[ReasoningPart], Field(max_length=MAX_PARTS, fail_fast=True)]


class MessageItem(Request):
    """A message with its role."""

    type: Literal["message"] | None = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: Name | None = None
    status: Status | None = None

    @model_validator(mode="after")
    def _has_parts_in_the_prompt(self) -> Self:
        marked = any(part.prompt_cache_breakpoint is not None for part in self.content)
        if marked and self.role == "assistant":
            raise ValueError("a message of the assistant has no prompt_cache_breakpoint")
        return self


class FunctionCallItem(Request):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: Name
    name: ToolName
    namespace: ToolName | None = None
    arguments: str
    id: Name | None = None
    status: Status | None = None


class CustomCallItem(Request):
    """A call of a custom tool that the model made."""

    type: Literal["custom_tool_call"]
    call_id: Name
    name: ToolName
    namespace: ToolName | None = None
    input: str
    id: Name | None = None
    status: Status | None = None


class ToolOutputItem(Request):
    """The result of a called tool."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: Name
    output: Content
    id: Name | None = None
    status: Status | None = None


class ReasoningItem(Request):
    """Reasoning of the model; the template decides whether later prompts contain it."""

    type: Literal["reasoning"]
    summary: ReasoningParts | None = None
    content: ReasoningParts | None = None
    encrypted_content: str | None = optional("is not read")
    id: Name | None = None
    status: Status | None = None


class ItemReference(Request):
    """An item of a response that is stored."""

    type: Literal["item_reference"] | None = "item_reference"
    id: Name


Item = (
    MessageItem | FunctionCallItem | CustomCallItem | ToolOutputItem | ReasoningItem | ItemReference
)

ITEMS: Mapping[str, type[Item]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": ToolOutputItem,
    "custom_tool_call": CustomCallItem,
    "custom_tool_call_output": ToolOutputItem,
    "reasoning": ReasoningItem,
    "item_reference": ItemReference,
}


class _ItemType(_Typed):
    types = tuple(ITEMS)


def _as_item(value: object) -> object:
    """Read it as its type says, so that a fault is one of that type alone."""
    if not isinstance(value, dict):
        raise ValueError("must be an object")  # noqa: TRY004 - pydantic reports a ValueError
    # Both may be left out; then it is plain which is meant.
    implied = "item_reference" if "id" in value and "role" not in value else "message"
    typed = value if value.get("type") is not None else {**value, "type": implied}
    return ITEMS[_ItemType.model_validate(typed).type].model_validate(typed)


def _as_items(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


AnyItem = Annotated[Any, BeforeValidator(_as_item, json_schema_input_type=Item)]
Items = Annotated[
    Annotated[list[AnyItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)],
    BeforeValidator(_as_items, json_schema_input_type=str | list[Item]),
]
