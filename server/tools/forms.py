"""How models write calls, for grammars that enforce it; `syntaxes` reads them.

Knows nothing of grammars.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from server.tools.harmony import HARMONY
from server.tools.marked import (
    CALL,
    CALLS,
    DEEPSEEK,
    END_CALL,
    END_CALLS,
    END_FENCE,
    END_KIMI_CALL,
    END_SECTION,
    FENCE,
    KIMI_ARGUMENTS,
    KIMI_CALL,
    KIMI_K2,
    SECTION,
    SEPARATOR,
)
from server.tools.syntaxes import HERMES, LLAMA, MISTRAL, CallSyntax


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
_DEEPSEEK = CallForm(
    opening=(CALLS,),
    closing=(END_CALLS,),
    before_name=(CALL,),
    before_arguments=(SEPARATOR,),
    after_arguments=(END_CALL,),
    marks=frozenset({CALLS, END_CALLS, CALL, END_CALL, SEPARATOR}),
)
#: Up to R1.
_DEEPSEEK_FENCED = replace(
    _DEEPSEEK,
    before_name=(CALL, "function", SEPARATOR),
    before_arguments=(f"\n{FENCE}\n",),
    after_arguments=(f"\n{END_FENCE}", END_CALL),
)
_KIMI_K2 = CallForm(
    opening=(SECTION,),
    closing=(END_SECTION,),
    before_name=(KIMI_CALL, "functions."),
    # The index belongs to an id, which is ignored.
    before_arguments=(":0", KIMI_ARGUMENTS),
    after_arguments=(END_KIMI_CALL,),
    marks=frozenset({SECTION, END_SECTION, KIMI_CALL, KIMI_ARGUMENTS, END_KIMI_CALL}),
)
_HARMONY = CallForm(
    between=("<|start|>", "assistant"),
    before_name=("<|channel|>", "commentary to=functions."),
    before_arguments=(" ", "<|constrain|>", "json", "<|message|>"),
    after_arguments=("<|end|>",),
    marks=frozenset({"<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>"}),
)
_LLAMA = CallForm(between=("; ",), before_arguments=('", "parameters": ',))
#: For models without calls, and for models that do not write arguments as JSON.
_BARE = CallForm(between=("\n",))
_FORMS = {HERMES: _HERMES, KIMI_K2: _KIMI_K2, HARMONY: _HARMONY, LLAMA: _LLAMA}


def call_form(syntax: CallSyntax, templates: Mapping[str, str]) -> CallForm:
    """Return the form in which a model with these templates writes calls of `syntax`."""
    if syntax is MISTRAL:
        has_named = any("[ARGS]" in source for source in templates.values())
        return _MISTRAL_NAMED if has_named else _MISTRAL
    if syntax is DEEPSEEK:
        is_fenced = any(FENCE in source for source in templates.values())
        return _DEEPSEEK_FENCED if is_fenced else _DEEPSEEK
    return _FORMS.get(syntax, _BARE)
