"""Calls of tools as a grammar: in the words of the model's own template, arguments by their schema.

Knows nothing of requests or of how calls are read (`server/tools/`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from server.structured.grammar import json_rule, literal
from server.tools.forms import CallForm

#: Calls in one answer, where several may be made.
_MAX_CALLS = 32


def call_rules(
    form: CallForm,
    tools: Sequence[tuple[str, dict[str, Any], bool]],
    *,
    is_single: bool,
    mark: Callable[[str], str],
) -> str:
    """Return rules with `calls`: one call or several. Raises `ValueError` as `json_rule` does.

    `tools`: (name, schema of the arguments, whether the schema is to be kept in every word).
    `mark`: gives the term for one of the format's marks, which may be a special token.
    """

    def terms(parts: Sequence[str]) -> str:
        return " ".join(mark(part) if part in form.marks else literal(part) for part in parts)

    lines = [f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
    more = "" if is_single else f" ({terms(form.between)} call){{0,{_MAX_CALLS - 1}}}"
    lines.insert(0, " ".join(["calls:", terms(form.opening), "call" + more, terms(form.closing)]))
    for i, (name, schema, is_strict) in enumerate(tools):
        before = terms([*form.before_name, name, *form.before_arguments])
        lines.append(f"call_{i}: {before} arguments_{i} {terms(form.after_arguments)}")
        lines.append(json_rule(f"arguments_{i}", schema, is_lenient=not is_strict))
    return "\n".join(lines)
