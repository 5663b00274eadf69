"""Calls of tools as a grammar: in the words of the model's own template, arguments by their schema.

Knows nothing of requests or of how calls are read (`server/tools/`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from server.structured.grammar import literal
from server.tools.forms import CallForm

#: Calls in one answer, where several may be made.
_MAX_CALLS = 32


def call_rules(
    form: CallForm,
    tools: Sequence[tuple[str, str]],
    *,
    is_single: bool,
    mark: Callable[[str], str],
) -> str:
    """Return rules with `calls`: one call or several.

    `tools`: names, and the rule for the arguments of each, which is called `arguments_rule(i)`.
    `mark`: gives the term for one of the format's marks, which may be a special token.
    """

    def terms(parts: Sequence[str]) -> str:
        return " ".join(mark(part) if part in form.marks else literal(part) for part in parts)

    lines = [f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
    more = "" if is_single else f" ({terms(form.between)} call){{0,{_MAX_CALLS - 1}}}"
    lines.insert(0, " ".join(["calls:", terms(form.opening), "call" + more, terms(form.closing)]))
    for i, (name, rule) in enumerate(tools):
        before = terms([*form.before_name, name, *form.before_arguments])
        lines.append(f"call_{i}: {before} {arguments_rule(i)} {terms(form.after_arguments)}")
        lines.append(rule)
    return "\n".join(lines)


def arguments_rule(i: int) -> str:
    """Return the name of the rule for the arguments of the tool that is `i`th to choose from."""
    return f"arguments_{i}"
