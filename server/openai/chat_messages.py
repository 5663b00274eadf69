"""Messages of a chat as requests hold them: OpenAI's shapes, strict types.

Knows nothing of templates.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from server.generation.caching import PromptCacheBreakpoint
from server.generation.generation_spec import PromptMessage
from server.generation.prompt_messages import MAX_PARTS, content_of, require_kind, text_part
from server.generation.request_fields import optional
from server.http.errors import Path
from server.tools.schemas import ToolCalls


def _as_kind(value: object) -> object:
    require_kind(value, ("text", "refusal"))
    return value


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ContentPart(BaseModel):
    """A piece of a message: text, or the words with which an assistant refused."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Annotated[Literal["text", "refusal"], BeforeValidator(_as_kind)]
    text: str | None = None
    refusal: str | None = None
    prompt_cache_breakpoint: PromptCacheBreakpoint | None = optional(
        "the prompt up to here is kept; see operations.md"
    )

    @model_validator(mode="after")
    def _has_words(self) -> Self:
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of the type {self.type} needs {self.type}")
        return self

    @property
    def words(self) -> str:
        """The text of it, whatever its type."""
        words: str = getattr(self, self.type)
        return words


class Message(BaseModel):
    """One message; further fields (`name`, ...) reach the template as they are."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: Annotated[
        Annotated[list[ContentPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None,
        BeforeValidator(_as_parts, json_schema_input_type=str | list[ContentPart] | None),
    ] = None
    refusal: str | None = optional("of the assistant: its content, where there is no other")
    tool_calls: ToolCalls | None = optional("what the assistant called")
    tool_call_id: str | None = optional("needed by the role tool")

    @model_validator(mode="after")
    def _answers_a_call(self) -> Self:
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of the role tool needs a tool_call_id")
        return self

    def for_prompt(self, path: Path) -> PromptMessage:
        """Return it as templates read it: OpenAI's `developer` is their `system`, null is ""."""
        parts = [text_part(part.words) for part in self.content or ()]
        calls: dict[str, Any] = {}
        if self.tool_calls is not None:
            calls["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            calls["tool_call_id"] = self.tool_call_id
        fields = {
            **(self.model_extra or {}),
            **calls,
            "role": "system" if self.role == "developer" else self.role,
            "content": content_of(parts) or self.refusal or "",
        }
        return PromptMessage(fields, path)
