"""The neutral parts of a request to generate: every API builds them from its own request model.

A part that an error may name carries its path in that request, so errors need no translation.
Knows nothing of templates, tokens or engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from server.http.errors import Path

ConstraintKind: TypeAlias = Literal["json", "regex", "choice", "grammar"]


class PromptMessage(NamedTuple):
    """A message as chat templates read it, and where it is in the request."""

    fields: Mapping[str, Any]
    path: Path


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool of any kind, as the function that the model reads."""

    name: str
    description: str | None
    #: A JSON Schema of the arguments; None: there are none.
    parameters: dict[str, Any] | None
    #: Of the object that holds the name.
    path: Path
    #: Of the schema or grammar of the arguments.
    schema_path: Path
    is_strict: bool = False
    #: It takes a text (`server/tools/custom.py`).
    is_custom: bool = False
    #: Of the grammar for the text of a custom tool.
    grammar_syntax: str | None = None

    def for_template(self) -> dict[str, Any]:
        """Return the function as templates show it, without the fields that were not given."""
        fields = {"name": self.name, "description": self.description, "parameters": self.parameters}
        given = {name: value for name, value in fields.items() if value is not None}
        return {"type": "function", "function": given}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which tools may or must be called."""

    mode: Literal["none", "auto", "required"]
    #: The only tools that may be called; None: all.
    names: tuple[str, ...] | None = None
    #: The request names one tool. Templates show the others too.
    is_named: bool = False


@dataclass(frozen=True, slots=True)
class Breakpoint:
    """The end of a block: the prompt up to there is to be kept for a lifetime.

    By default the block is the end of the last message's content.
    """

    #: Of the field that asks for it.
    path: Path
    #: A name in `LIFETIMES_S`.
    lifetime: str
    #: Index of the message, and of the part of its content, or of one of its calls.
    message: int = -1
    part: int = -1
    call: int | None = None
    #: Name of the tool, where the block is a tool.
    tool: str | None = None


@dataclass(frozen=True, slots=True)
class CachingWish:
    """The part of a request about the cache, before the prompt has tokens."""

    breakpoints: tuple[Breakpoint, ...] = ()
    #: Nothing behind the last breakpoint may stay cached.
    is_explicit: bool = False
    #: The prompt is computed and cached, and no answer written.
    is_prewarming: bool = False
    #: A label for the log line.
    key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Input of the model's chat template; None: the default of the template."""

    messages: Sequence[PromptMessage]
    #: Of the conversation as a whole.
    path: Path = ("messages",)
    tools: Sequence[ToolSpec] = ()
    tool_use: ToolUse | None = None
    has_parallel_calls: bool | None = None
    variables: Mapping[str, Any]
    reasoning_effort: str | None = None
    effort_path: Path = ("reasoning_effort",)
    #: Whether the answer shows the reasoning.
    has_reasoning: bool = True
    add_generation_prompt: bool | None = None
    #: The answer goes on with the last message.
    continues_last: bool = False
    add_special_tokens: bool = False
    caching: CachingWish = CachingWish()
    #: Of the request: a measure of the time to render.
    num_bytes: int


@dataclass(frozen=True, slots=True)
class TextPrompts:
    """Prompts to go on with: texts or token ids."""

    prompts: Sequence[str | list[int]]
    add_special_tokens: bool
    #: Whether the answer repeats the prompt.
    is_echoed: bool

    def path_of(self, index: int) -> Path:
        """Return where a prompt is in the request."""
        return ("prompt",) if len(self.prompts) == 1 else ("prompt", index)


@dataclass(frozen=True, slots=True)
class OutputConstraint:
    """The form that an answer must have."""

    kind: ConstraintKind
    #: A JSON Schema, a pattern, texts or a grammar.
    value: Any
    #: Of the field, and of the value within it.
    path: Path
    value_path: Path
    is_lenient: bool = False
    is_compact: bool = False
    whitespace: str | None = None
