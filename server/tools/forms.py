"""How calls are to be written, for those who make a model write them; `syntaxes` read them.

Knows nothing of grammars.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from server.tools.syntaxes import HERMES, MISTRAL, CallSyntax


@dataclass(frozen=True, slots=True)
class CallForm:
    """The text around names and arguments, part by part."""

    #: Before the first call of an answer, between two of them, behind the last.
    opening: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    closing: tuple[str, ...] = ()
    #: Of one call.
    before_name: tuple[str, ...] = ('{"name": "',)
    before_arguments: tuple[str, ...] = ('", "arguments": ',)
    after_arguments: tuple[str, ...] = ("}",)
    #: Parts that may be special tokens of the model.
    marks: frozenset[str] = frozenset()


_HERMES = CallForm(
    between=("\n",),
    before_name=("<tool_call>", '\n{"name": "'),
    after_arguments=("}\n", "</tool_call>"),
    marks=frozenset({"<tool_call>", "</tool_call>"}),
)
_MISTRAL = CallForm(
    opening=("[TOOL_CALLS]", "["),
    between=(", ",),
    closing=("]",),
    marks=frozenset({"[TOOL_CALLS]"}),
)
#: Later versions of the same.
_MISTRAL_NAMED = CallForm(
    before_name=("[TOOL_CALLS]",),
    before_arguments=("[ARGS]",),
    after_arguments=(),
    marks=frozenset({"[TOOL_CALLS]", "[ARGS]"}),
)
_LLAMA = CallForm(between=("; ",), before_arguments=('", "parameters": ',))
_BARE = CallForm(between=("\n",))


def call_form(syntax: CallSyntax, templates: Mapping[str, str]) -> CallForm:
    """Return how a model with these templates writes what `syntax` reads."""
    if syntax is HERMES:
        return _HERMES
    if syntax is MISTRAL:
        has_named = any("[ARGS]" in source for source in templates.values())
        return _MISTRAL_NAMED if has_named else _MISTRAL
    return _LLAMA if syntax.markers else _BARE
