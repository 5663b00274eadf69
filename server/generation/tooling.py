"""The tools of a chat: which ones the model may call, and how its output is parsed.

Knows nothing of how answers are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.generation.generation_spec import Conversation, ToolSpec
from server.generation.params import Warned, ignored, warning
from server.http.errors import dotted, invalid
from server.service import Service
from server.tools.declared import call_syntax, opens_reasoning, think_tags
from server.tools.output_parser import OutputSyntax
from server.tools.syntaxes import BARE, HERMES, CallSyntax

#: Enough of a prompt's end to hold a tag that opens reasoning and the lines behind it.
_TAIL_TOKENS = 24
_IN_TEXT = "a system message lists them, and calls are read in the form of Hermes"


@dataclass(frozen=True, slots=True)
class ParserOptions:
    """How the output for a chat is parsed and sent."""

    syntax: OutputSyntax
    has_parallel_calls: bool = True
    has_reasoning: bool = True
    #: The request names the one tool to call (then OpenAI's finish reason is "stop").
    is_named: bool = False
    #: Of the tools that take a text.
    custom_names: frozenset[str] = frozenset()


def tools_are_text(service: Service) -> bool:
    """Return whether tools, calls and results are rendered as text, not by the template."""
    template, model = service.text.template, service.config.model
    is_wanted = model.tools_in_prompt == "auto" and model.tool_call_parser in {"auto", "hermes"}
    return is_wanted and template is not None and not template.shows_tools


def is_forced(chat: Conversation) -> bool:
    """Return whether the answer must be a call."""
    return chat.tool_use is not None and chat.tool_use.mode == "required"


def forced_tools(chat: Conversation, tools: Sequence[ToolSpec]) -> list[ToolSpec]:
    """Return those of the callable tools that a forced call may call."""
    names = None if chat.tool_use is None else chat.tool_use.names
    return [tool for tool in tools if names is None or tool.name in names]


def callable_tools(service: Service, chat: Conversation) -> list[ToolSpec]:
    """Return the tools that the model may call. Raises `ApiError`."""
    tools, use = list(chat.tools), chat.tool_use
    if use is not None and use.mode == "none":
        return []
    if use is not None and not tools:
        shown = repr(use.mode) if use.names is None else "by name"
        raise invalid(f"tool_choice {shown} needs tools", "tool_choice")
    seen: set[str] = set()
    for tool in tools:
        if tool.name in seen:
            path = (*tool.path, "name")
            raise invalid(f"{dotted(path)}: two tools have this name", path)
        seen.add(tool.name)
    if use is not None and use.names is not None:
        for name in use.names:
            if name not in seen:
                message = f"tool_choice names {name!r}, which is none of the tools"
                raise invalid(message, "tool_choice")
        if not use.is_named:
            tools = [tool for tool in tools if tool.name in use.names]
    if tools and not is_forced(chat) and _syntax(service) is None:
        message = (
            "tools are not supported by this model: its chat template has none (--tools-in-prompt"
            " auto lists them in the prompt), or a format of calls that is not read here"
            " (--tool-call-parser)"
        )
        raise invalid(message, "tools", code="unsupported_parameter")
    return tools


def tool_warnings(service: Service, chat: Conversation, tools: Sequence[ToolSpec]) -> list[Warned]:
    """Return warnings for fields of the callable tools without effect."""
    warnings: list[Warned] = []
    template = service.text.template
    if tools and template is not None and not template.shows_tools:
        message = "the model's chat template has no place for tools: "
        message += _IN_TEXT if tools_are_text(service) else "they are not in the prompt"
        warnings.append({"param": "tools", "message": message})
    for tool in tools:
        if tool.grammar_syntax and not (is_forced(chat) and tool.grammar_syntax == "regex"):
            text = "is in the prompt and not enforced: only a regex is, where tool_choice"
            warnings.append(warning(tool.schema_path, f"{text} is 'required' or names the tool"))
        elif tool.is_strict and not is_forced(chat):
            because = "arguments are held to the schema only where tool_choice"
            path = (*tool.path, "strict")
            warnings.append(ignored(path, f"{because} is 'required' or names the tool"))
    return warnings


def prompt_end(service: Service, prompt: Sequence[int]) -> str:
    """Return the last words of a prompt, special tokens and all."""
    return service.text.tokenizer.decode(prompt[-_TAIL_TOKENS:], skip_special_tokens=False)


def parser_options(
    service: Service, chat: Conversation, tools: Sequence[ToolSpec], prompt: Sequence[int]
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
            tool_names=frozenset(tool.name for tool in tools),
            schemas={tool.name: tool.parameters or {} for tool in tools},
        ),
        has_parallel_calls=chat.has_parallel_calls is not False,
        has_reasoning=chat.has_reasoning,
        is_named=chat.tool_use is not None and chat.tool_use.is_named,
        custom_names=frozenset(tool.name for tool in tools if tool.is_custom),
    )


def _syntax(service: Service) -> CallSyntax | None:
    template = service.text.template
    if template is None:
        return None
    if tools_are_text(service):
        return HERMES
    return call_syntax(template.sources, service.config.model.tool_call_parser)
