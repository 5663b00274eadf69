"""The kinds of tools of a response, and the functions that the model reads.

A namespace's tools are separate functions for the model, with its name before theirs. Tools that
OpenAI runs, or that a client runs in a form which models learn for it alone, are left out with a
warning. Knows nothing of parsing or sending calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from server.generation import params
from server.generation.generation_spec import ToolSpec, ToolUse
from server.generation.params import Warned, warned
from server.generation.request_fields import Request, optional
from server.http.errors import Path, dotted, from_validation, invalid, shortened
from server.structured.schemas import MAX_GRAMMAR_CHARS
from server.tools.custom import custom_tool
from server.tools.schemas import MAX_TOOLS, ToolName

#: Between the names of a namespace and of a tool: templates and parsers take it for a name.
_JOINT = "__"
_NAME = TypeAdapter[str](ToolName)
#: Kinds of tools that are known and not served, and why.
LEFT_OUT: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "file_search",
            "web_search",
            "web_search_2025_08_26",
            "web_search_preview",
            "web_search_preview_2025_03_11",
            "code_interpreter",
            "image_generation",
            "mcp",
            "programmatic_tool_calling",
        ),
        "it runs on OpenAI's servers, and this one runs no tools",
    ),
    **dict.fromkeys(
        ("computer", "computer_use", "computer_use_preview"),
        "it answers with pictures, and there are none here",
    ),
    **dict.fromkeys(
        ("local_shell", "shell", "apply_patch"),
        "its calls have a form of their own; give it as a function",
    ),
    "tool_search": "all tools are in the prompt",
}
#: Named, for the table below holds it as a value, not as a switch.
_FALSE = False
#: Fields of tools without effect.
_TOOL = {
    "allowed_callers": warned("the model calls", ["direct"]),
    "defer_loading": warned("all tools are in the prompt", _FALSE),
    "async": warned("a call ends the answer", _FALSE),
    "output_schema": warned("it is not in the prompt"),
}


class ResponseFunctionTool(Request):
    """A function that the model may call."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = optional(
        "a JSON Schema of the arguments; default: none are taken"
    )
    strict: bool | None = None


class ResponseCustomFormat(Request):
    """The input of a custom tool."""

    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)] | None = None

    @model_validator(mode="after")
    def _has_its_grammar(self) -> Self:
        is_grammar = self.type == "grammar"
        if is_grammar in {self.syntax is None, self.definition is None}:
            raise ValueError("syntax and definition and the type 'grammar' need each other")
        return self


class ResponseCustomTool(Request):
    """A tool that takes a text."""

    type: Literal["custom"]
    name: ToolName
    description: str | None = None
    format: ResponseCustomFormat | None = None


class NamespaceTool(Request):
    """Tools under one name."""

    type: Literal["namespace"]
    name: ToolName
    description: str | None = None
    tools: Annotated[
        list[
            Annotated[
                Any,
                BeforeValidator(
                    lambda value: _as_tool(value, is_called=True),
                    json_schema_input_type=ResponseFunctionTool | ResponseCustomTool,
                ),
            ]
        ],
        Field(max_length=MAX_TOOLS, fail_fast=True),
    ]


class HostedTool(Request):
    """A tool that is left out."""

    type: str


AnyTool = ResponseFunctionTool | ResponseCustomTool | NamespaceTool | HostedTool
_KINDS: Mapping[str, type[Request]] = {
    "function": ResponseFunctionTool,
    "custom": ResponseCustomTool,
    "namespace": NamespaceTool,
    **dict.fromkeys(LEFT_OUT, HostedTool),
}


class _Kind(Request):
    type: str

    @field_validator("type")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in _KINDS:
            known = ", ".join(repr(kind) for kind in _KINDS if kind not in LEFT_OUT)
            raise ValueError(f"{shortened(value)!r} is not supported; it can be {known}")
        return value


def _as_tool(value: object, *, is_called: bool = False) -> object:
    """Read it as its type says, so that a fault is one of that type alone."""
    model = _KINDS[_Kind.model_validate(value).type]
    if is_called and model not in (ResponseFunctionTool, ResponseCustomTool):
        raise ValueError("a namespace holds functions and custom tools")
    return model.model_validate(value)


Tools = Annotated[
    list[Annotated[Any, BeforeValidator(_as_tool, json_schema_input_type=AnyTool)]],
    Field(max_length=MAX_TOOLS, fail_fast=True),
]


@dataclass(frozen=True, slots=True)
class CallableTool:
    """A tool that the model may call."""

    #: Where it stands in the request.
    path: Path
    given: ResponseFunctionTool | ResponseCustomTool
    namespace: str | None = None
    #: Of the namespace, with its first tool.
    introduction: str | None = None

    @property
    def name(self) -> str:
        """Its name for the model."""
        return chat_name(self.namespace, self.given.name)

    def spec(self) -> ToolSpec:
        """Return it as the model reads it. Raises `ApiError` for a name that is too long."""
        try:
            _NAME.validate_python(self.name)
        except ValidationError as error:
            raise from_validation(error, (*self.path, "name")) from error
        given, words = self.given, filter(None, (self.introduction, self.given.description))
        description = "\n\n".join(words) or None
        if isinstance(given, ResponseFunctionTool):
            return ToolSpec(
                self.name,
                description,
                given.parameters,
                self.path,
                (*self.path, "parameters"),
                is_strict=given.strict is True,
            )
        return custom_tool(
            self.name,
            description,
            None if given.format is None else given.format.syntax,
            None if given.format is None else given.format.definition,
            path=self.path,
            schema_path=(*self.path, "format"),
        )


def chat_name(namespace: str | None, name: str) -> str:
    """Return the name of a tool in a chat."""
    return name if namespace is None else f"{namespace}{_JOINT}{name}"


def callable_tools(tools: Sequence[AnyTool]) -> list[CallableTool]:
    """Return the tools that a chat has, in their order. Raises `ApiError` for too many."""
    found = list(_callable(tools))
    if len(found) > MAX_TOOLS:
        raise invalid(f"tools: there are more than {MAX_TOOLS} in all", "tools")
    return found


def _callable(tools: Sequence[AnyTool]) -> Iterator[CallableTool]:
    for index, tool in enumerate(tools):
        if isinstance(tool, ResponseFunctionTool | ResponseCustomTool):
            yield CallableTool(("tools", index), tool)
        elif isinstance(tool, NamespaceTool):
            for place, one in enumerate(tool.tools):
                words = tool.description if place == 0 else None
                path = ("tools", index, "tools", place)
                yield CallableTool(path, one, tool.name, words)


def tool_warnings(tools: Sequence[AnyTool]) -> list[Warned]:
    """Return warnings for tools and their fields without effect."""
    warnings: list[Warned] = []
    for index, tool in enumerate(tools):
        param = f"tools.{index}"
        if isinstance(tool, HostedTool):
            because = LEFT_OUT[tool.type]
            warnings.append(params.warning(param, f"({tool.type}) was left out: {because}"))
        elif isinstance(tool, NamespaceTool):
            warnings += params.judge(tool.model_extra, _TOOL, f"{param}.")
    for one in callable_tools(tools):
        param = dotted(one.path)
        warnings += params.judge(one.given.model_extra, _TOOL, f"{param}.")
        if isinstance(one.given, ResponseCustomTool) and one.given.format is not None:
            warnings += params.judge(one.given.format.model_extra, {}, f"{param}.format.")
    return warnings


class NamedTool(Request):
    """The one tool to be called."""

    type: Literal["function", "custom"]
    name: ToolName
    namespace: ToolName | None = None


class ResponseAllowedTools(Request):
    """The tools that may be called, of all there are."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS, fail_fast=True)]


Choice = Literal["none", "auto", "required"] | NamedTool | ResponseAllowedTools


def _as_choice(value: object) -> object:
    """Validate by the given type alone, so that there is one fault and not one of each type."""
    if isinstance(value, str) and value in {"none", "auto", "required"}:
        return value
    kind = str(value.get("type")) if isinstance(value, dict) else ""
    if kind in {"function", "custom"}:
        return NamedTool.model_validate(value)
    if kind == "allowed_tools":
        return ResponseAllowedTools.model_validate(value)
    if kind in LEFT_OUT:
        raise ValueError(f"cannot be a tool of the type {kind!r}: {LEFT_OUT[kind]}")
    raise ValueError("must be 'none', 'auto', 'required', a tool by its name, or allowed_tools")


ToolChoice = Annotated[Any, BeforeValidator(_as_choice, json_schema_input_type=Choice)]


def tool_use(choice: Choice | None, tools: Sequence[CallableTool]) -> ToolUse | None:
    """Return which tools may be called. Raises `ApiError` for an unknown tool."""
    if choice is None:
        return None
    if isinstance(choice, NamedTool):
        return ToolUse("required", (chat_name(choice.namespace, choice.name),), is_named=True)
    if not isinstance(choice, ResponseAllowedTools):
        # OpenAI's default, which many clients send along with no tools at all.
        return ToolUse(choice) if tools or choice != "auto" else None
    names: list[str] = []
    for index, one in enumerate(choice.tools):
        kind, name = one.get("type"), one.get("name")
        if isinstance(kind, str) and kind in LEFT_OUT:
            continue
        found = [tool.name for tool in tools if _is_meant(tool, one)]
        if not found:
            path = ("tool_choice", "tools", index)
            raise invalid(f"{dotted(path)}: {shortened(str(name))!r} is none of the tools", path)
        names += found
    if names:
        return ToolUse(choice.mode, tuple(names))
    return ToolUse("none" if choice.mode == "auto" else "required")


def _is_meant(tool: CallableTool, entry: Mapping[str, Any]) -> bool:
    if entry.get("type") == "namespace":
        return tool.namespace == entry.get("name")
    meant = (entry.get("type"), entry.get("name"), entry.get("namespace"))
    return meant == (tool.given.type, tool.given.name, tool.namespace)
