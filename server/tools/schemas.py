"""Tools and calls as requests hold them: OpenAI's shapes, strict types.

Knows nothing of templates or of what becomes of a tool.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from server.tools.source import TOOL_NAME

#: More of these in one request are a mistake or an attack.
MAX_TOOLS = 1024
MAX_CALLS = 1024

ToolName = Annotated[str, Field(pattern=f"^{TOOL_NAME}$")]


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class ToolFunction(_Shape):
    """A function that the model may call."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        default=None, description="a JSON Schema of the arguments; default: none are taken"
    )
    strict: bool | None = None


class Tool(_Shape):
    """A tool: functions are the only kind."""

    type: Literal["function"]
    function: ToolFunction

    def for_template(self) -> dict[str, Any]:
        """Return what templates show the model: nothing that was not given."""
        return {
            "type": "function",
            "function": self.function.model_dump(
                include={"name", "description", "parameters"}, exclude_none=True
            ),
        }


class FunctionName(_Shape):
    """The function of a choice."""

    name: ToolName


class ToolChoice(_Shape):
    """The one tool to be called."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(_Shape):
    """A function and its arguments, a string of JSON."""

    name: str
    arguments: Annotated[str, AfterValidator(lambda text: text or "{}")]


class ToolCall(_Shape):
    """A call in a message of the assistant."""

    id: str
    type: Literal["function"]
    function: CalledFunction


def _as_choice(value: object) -> object:
    """One fault of the field, not one of each shape it could have had."""
    if isinstance(value, str) and value in {"none", "auto", "required"}:
        return value
    if isinstance(value, dict):
        try:
            return ToolChoice.model_validate(value)
        except ValidationError:
            pass
    raise ValueError("must be 'none', 'auto', 'required' or a function by its name")


Choice = Annotated[
    Any,
    BeforeValidator(
        _as_choice, json_schema_input_type=Literal["none", "auto", "required"] | ToolChoice
    ),
]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]
ToolCalls = Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)]
