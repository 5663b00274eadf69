"""Tools and calls in requests: OpenAI's shapes, strict types.

Knows nothing of templates or of the use of a tool.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from server.generation.generation_spec import ToolSpec, ToolUse
from server.http.errors import Path
from server.structured.schemas import MAX_GRAMMAR_CHARS
from server.tools.custom import arguments_of, custom_tool
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


class FunctionTool(_Shape):
    """A function that the model may call."""

    type: Literal["function"]
    function: ToolFunction

    def spec(self, path: Path) -> ToolSpec:
        """Return the tool as the model reads it."""
        given, at = self.function, (*path, "function")
        return ToolSpec(
            given.name,
            given.description,
            given.parameters,
            at,
            (*at, "parameters"),
            is_strict=given.strict is True,
        )


class Grammar(_Shape):
    """The grammar of a custom tool's input."""

    syntax: Literal["lark", "regex"]
    definition: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]


class CustomFormat(_Shape):
    """The input of a custom tool."""

    type: Literal["text", "grammar"]
    grammar: Grammar | None = None

    @model_validator(mode="after")
    def _has_its_grammar(self) -> Self:
        if (self.type == "grammar") != (self.grammar is not None):
            raise ValueError("grammar and the type 'grammar' need each other")
        return self


class Custom(_Shape):
    """A tool that takes a text."""

    name: ToolName
    description: str | None = None
    format: CustomFormat | None = None


class CustomTool(_Shape):
    """A tool that takes a text; for the model it is a function (`server/tools/custom.py`)."""

    type: Literal["custom"]
    custom: Custom

    def spec(self, path: Path) -> ToolSpec:
        """Return the tool as the model reads it."""
        grammar = None if self.custom.format is None else self.custom.format.grammar
        return custom_tool(
            self.custom.name,
            self.custom.description,
            None if grammar is None else grammar.syntax,
            None if grammar is None else grammar.definition,
            path=(*path, "function"),
            schema_path=(*path, "custom", "format", "grammar"),
        )


Tool = FunctionTool | CustomTool
_TOOLS: Mapping[str, type[FunctionTool | CustomTool]] = {
    "function": FunctionTool,
    "custom": CustomTool,
}


class _Kind(_Shape):
    type: Literal["function", "custom"]


def _as_tool(value: object) -> object:
    """Read a tool by its type, so that errors are about that type alone."""
    return _TOOLS[_Kind.model_validate(value).type].model_validate(value)


class FunctionName(_Shape):
    """The tool of a choice."""

    name: ToolName


class ToolChoice(_Shape):
    """The one tool to be called."""

    type: Literal["function", "custom"]
    function: FunctionName

    @model_validator(mode="before")
    @classmethod
    def _of_any_kind(cls, value: object) -> object:
        if isinstance(value, dict) and value.get("type") == "custom":
            return {"type": "custom", "function": value.get("custom")}
        return value

    def tool_use(self) -> ToolUse:
        """Return the choice for the prompt and the grammar."""
        return ToolUse("required", (self.function.name,), is_named=True)


class AllowedTools(_Shape):
    """The tools that may be called, out of all tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolChoice], Field(max_length=MAX_TOOLS, fail_fast=True)]


class AllowedToolsChoice(_Shape):
    """Which tools may or must be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools

    def tool_use(self) -> ToolUse:
        """Return the choice for the prompt and the grammar."""
        allowed = self.allowed_tools
        return ToolUse(allowed.mode, tuple(tool.function.name for tool in allowed.tools))


class CalledFunctionInput(_Shape):
    """A function and its arguments, a string of JSON."""

    name: str
    arguments: Annotated[str, AfterValidator(lambda text: text or "{}")]


class CalledCustomInput(_Shape):
    """A custom tool and its input."""

    name: str
    input: str


class _CustomCall(_Shape):
    custom: CalledCustomInput


class ToolCallInput(_Shape):
    """A call in a message of the assistant."""

    id: str
    type: Literal["function"]
    function: CalledFunctionInput

    @model_validator(mode="before")
    @classmethod
    def _of_any_kind(cls, value: object) -> object:
        """Read the call of a custom tool as that of a function."""
        if not isinstance(value, dict) or value.get("type") != "custom":
            return value
        called = _CustomCall.model_validate(value).custom
        function = {"name": called.name, "arguments": arguments_of(called.input)}
        rest = {name: one for name, one in value.items() if name != "custom"}
        return {**rest, "type": "function", "function": function}


_CHOICES: Mapping[str, type[ToolChoice | AllowedToolsChoice]] = {
    "function": ToolChoice,
    "custom": ToolChoice,
    "allowed_tools": AllowedToolsChoice,
}


def _as_choice(value: object) -> object:
    """Report one error of the field, not one for each shape that is allowed."""
    if isinstance(value, str) and value in {"none", "auto", "required"}:
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind in _CHOICES:
        return _CHOICES[kind].model_validate(value)
    raise ValueError("must be 'none', 'auto', 'required', a tool by its name, or allowed_tools")


Choice = Annotated[
    Any,
    BeforeValidator(
        _as_choice,
        json_schema_input_type=Literal["none", "auto", "required"]
        | ToolChoice
        | AllowedToolsChoice,
    ),
]
AnyTool = Annotated[Tool, BeforeValidator(_as_tool, json_schema_input_type=Tool)]
Tools = Annotated[list[AnyTool], Field(max_length=MAX_TOOLS, fail_fast=True)]
ToolCalls = Annotated[list[ToolCallInput], Field(max_length=MAX_CALLS, fail_fast=True)]
