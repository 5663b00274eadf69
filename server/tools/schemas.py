"""Tools and calls in requests: OpenAI's shapes, strict types.

Knows nothing of templates or of the use of a tool.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from server.structured.schemas import MAX_GRAMMAR_CHARS
from server.tools.custom import INPUT, arguments_of
from server.tools.source import TOOL_NAME

#: More of these in one request are a mistake or an attack.
MAX_TOOLS = 1024
MAX_CALLS = 1024

_SYNTAXES = {"lark": "a Lark grammar", "regex": "a regular expression"}

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

    def for_template(self) -> dict[str, Any]:
        """Return the fields that templates show to the model, as far as they were given."""
        given = self.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
        return {"type": "function", "function": given}


class FunctionTool(_Shape):
    """A function that the model may call."""

    #: The field with the schema of its arguments, for errors.
    schema_field: ClassVar[str] = "function.parameters"

    type: Literal["function"]
    function: ToolFunction


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

    schema_field: ClassVar[str] = "custom.format.grammar"

    type: Literal["custom"]
    custom: Custom

    @property
    def grammar(self) -> Grammar | None:
        """The grammar of its input."""
        return None if self.custom.format is None else self.custom.format.grammar

    @cached_property
    def function(self) -> ToolFunction:
        """The tool as a function; its description gives the model the grammar."""
        text: dict[str, Any] = {"type": "string"}
        words = [self.custom.description] if self.custom.description else []
        if (given := self.grammar) is not None:
            words.append(f"The input matches {_SYNTAXES[given.syntax]}:\n{given.definition}")
            if given.syntax == "regex":
                text["pattern"] = f"^(?:{given.definition})$"
        schema = {"type": "object", "properties": {INPUT: text}, "required": [INPUT]}
        return ToolFunction(
            name=self.custom.name,
            description="\n\n".join(words) or None,
            parameters={**schema, "additionalProperties": False},
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


class AllowedTools(_Shape):
    """The tools that may be called, out of all tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolChoice], Field(max_length=MAX_TOOLS, fail_fast=True)]


class AllowedToolsChoice(_Shape):
    """Which tools may or must be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class CalledFunction(_Shape):
    """A function and its arguments, a string of JSON."""

    name: str
    arguments: Annotated[str, AfterValidator(lambda text: text or "{}")]


class CalledCustom(_Shape):
    """A custom tool and its input."""

    name: str
    input: str


class _CustomCall(_Shape):
    custom: CalledCustom


class ToolCall(_Shape):
    """A call in a message of the assistant."""

    id: str
    type: Literal["function"]
    function: CalledFunction

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
ToolCalls = Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)]
