"""What a chat's tools ask for: what the template is shown, and how the answer is to be read.

Knows nothing of how answers are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.generation.params import Warned
from server.generation.reasoning import ReasoningCounter
from server.http.errors import ApiError, invalid
from server.openai.schemas import ChatRequest
from server.service import Service
from server.text.token_bytes import TokenBytes
from server.tools.declared import call_syntax, opens_reasoning, think_tags
from server.tools.output_parser import OutputSyntax
from server.tools.schemas import AllowedToolsChoice, CustomTool, Tool, ToolChoice
from server.tools.syntaxes import BARE, HERMES, CallSyntax

#: Enough of a prompt's end to hold a tag that opens reasoning and the lines behind it.
_TAIL_TOKENS = 24
_IN_TEXT = "a system message lists them, and calls are read in the form of Hermes"


@dataclass(frozen=True, slots=True)
class ParserOptions:
    """How the answer to a chat is read and told."""

    syntax: OutputSyntax
    has_parallel_calls: bool = True
    has_reasoning: bool = True
    #: The one call there is was asked for by its name (then OpenAI says "stop").
    is_named: bool = False
    #: Of the tools that take a text.
    custom_names: frozenset[str] = frozenset()

    def counter(self, pieces: TokenBytes) -> ReasoningCounter | None:
        """Return what counts reasoning in tokens shown as `pieces`; None: the model does none."""
        tags = self.syntax.tags
        if tags is None:
            return None
        return ReasoningCounter(pieces, tags, is_thinking=self.syntax.is_thinking)


def tools_are_text(service: Service) -> bool:
    """Whether the model is shown tools, calls and results as text: its template has no place."""
    template, model = service.text.template, service.config.model
    is_wanted = model.tools_in_prompt == "auto" and model.tool_call_parser in {"auto", "hermes"}
    return is_wanted and template is not None and not template.shows_tools


def is_forced(request: ChatRequest) -> bool:
    """Whether the answer must be a call."""
    choice = request.tool_choice
    if isinstance(choice, AllowedToolsChoice):
        return choice.allowed_tools.mode == "required"
    return choice not in (None, "none", "auto")


def forced_tools(request: ChatRequest, tools: Sequence[Tool]) -> list[Tool]:
    """Return those of the callable tools that may be the one which is called."""
    choice = request.tool_choice
    if isinstance(choice, ToolChoice):
        return [tool for tool in tools if tool.function.name == choice.function.name]
    return list(tools)


def callable_tools(service: Service, request: ChatRequest) -> list[Tool]:
    """Return the tools that the model may call. Raises `ApiError`."""
    tools, choice = request.tools or [], request.tool_choice
    if choice == "none":
        return []
    if choice is not None and not tools:
        shown = repr(choice) if isinstance(choice, str) else "by name"
        raise invalid(f"tool_choice {shown} needs tools", "tool_choice")
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.function.name in seen:
            param = f"tools.{index}.function.name"
            raise invalid(f"{param}: two tools have this name", param)
        seen.add(tool.function.name)
    for name in _chosen(choice):
        if name not in seen:
            message = f"tool_choice names {name!r}, which is none of the tools"
            raise invalid(message, "tool_choice")
    if isinstance(choice, AllowedToolsChoice):
        tools = [tool for tool in tools if tool.function.name in _chosen(choice)]
    if tools and not is_forced(request) and _syntax(service) is None:
        raise _no_tools()
    return tools


def _chosen(choice: object) -> list[str]:
    """Return the tools that a choice names."""
    if isinstance(choice, AllowedToolsChoice):
        return [one.function.name for one in choice.allowed_tools.tools]
    return [choice.function.name] if isinstance(choice, ToolChoice) else []


def numbered(request: ChatRequest, tools: Sequence[Tool]) -> list[tuple[int, Tool]]:
    """Return tools with their places in the request."""
    places = {id(tool): place for place, tool in enumerate(request.tools or ())}
    return [(places[id(tool)], tool) for tool in tools]


def tool_warnings(service: Service, request: ChatRequest, tools: Sequence[Tool]) -> list[Warned]:
    """Return what of the tools has no effect."""
    warnings: list[Warned] = []
    template = service.text.template
    if tools and template is not None and not template.shows_tools:
        told = "the model's chat template has no place for tools: "
        told += _IN_TEXT if tools_are_text(service) else "the model is not shown them"
        warnings.append({"param": "tools", "message": told})
    for index, tool in numbered(request, tools):
        if isinstance(tool, CustomTool):
            warnings += _custom_warnings(tool, f"tools.{index}.", is_forced=is_forced(request))
            continue
        if tool.function.strict and not is_forced(request):
            param = f"tools.{index}.function.strict"
            told = (
                f"{param} was ignored: arguments are held to the schema only where tool_choice is"
                " 'required' or names the tool"
            )
            warnings.append({"param": param, "message": told})
    return warnings


def _custom_warnings(tool: CustomTool, at: str, *, is_forced: bool) -> list[Warned]:
    grammar = tool.grammar
    if grammar is None or (is_forced and grammar.syntax == "regex"):
        return []
    param = at + CustomTool.schema_field
    told = (
        f"{param} is shown to the model, which is not held to it: that is done for regex alone,"
        " where tool_choice is 'required' or names the tool"
    )
    return [{"param": param, "message": told}]


def prompt_end(service: Service, prompt: Sequence[int]) -> str:
    """Return the last words of a prompt, special tokens and all."""
    return service.text.tokenizer.decode(prompt[-_TAIL_TOKENS:], skip_special_tokens=False)


def parser_options(
    service: Service, request: ChatRequest, tools: Sequence[Tool], prompt: Sequence[int]
) -> ParserOptions | None:
    """Return how the answer is read; None: it is plain text. `tools`: the callable ones."""
    template = service.text.template
    assert template is not None, "a chat was rendered without a template"
    tags = think_tags(template.sources, service.config.model.reasoning_parser)
    calls = (_syntax(service) or BARE) if tools else None
    if tags is None and calls is None:
        return None
    end = prompt_end(service, prompt)
    return ParserOptions(
        OutputSyntax(
            calls,
            tags,
            is_thinking=tags is not None and opens_reasoning(end, tags),
            tool_names=frozenset(tool.function.name for tool in tools),
            schemas={tool.function.name: tool.function.parameters or {} for tool in tools},
        ),
        has_parallel_calls=request.parallel_tool_calls is not False,
        has_reasoning=request.include_reasoning is not False,
        is_named=isinstance(request.tool_choice, ToolChoice),
        custom_names=frozenset(one.custom.name for one in tools if isinstance(one, CustomTool)),
    )


def _syntax(service: Service) -> CallSyntax | None:
    template = service.text.template
    if template is None:
        return None
    if tools_are_text(service):
        return HERMES
    return call_syntax(template.sources, service.config.model.tool_call_parser)


def _no_tools() -> ApiError:
    message = (
        "tools are not supported by this model: its chat template has none (--tools-in-prompt auto"
        " shows them all the same), or a format of calls that is not read here (--tool-call-parser)"
    )
    return invalid(message, "tools", code="unsupported_parameter")
