"""Forms of output in the language of grammars (llguidance's Lark). Pure text in, text out.

A `Form` is a rule named `body` and the rules it refers to. `whole` puts it behind the reasoning and
beside the calls of tools, which are in the words of the model's own template. Knows nothing of
requests, of models, of the cost of a grammar or of how calls are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from server.tools.syntaxes import CallForm

#: The model may choose the tokens of forced text, unlike a tokenizer.
_HEAD = '%llguidance {"no_forcing": true}'
#: One space, or a line break with indentation: small models would write spaces without end.
_WHITESPACE = r"[ ]|\n[ ]{0,32}"
#: Patterns of JSON's white space alone.
_WHITE = re.compile(r"([ \t\n\r]|\\[tnrs]|\\x(20|0[9aAdD])|[][()|?*+]|\{\d*(,\d*)?\})*")
#: Parts of a pattern as written between slashes. Digits and letters are ASCII, as in the patterns
#: of JSON Schema: otherwise a model may write a date in Thai digits.
_IN_SLASHES = {
    "/": r"\/",
    "\n": r"\n",
    "\\\n": r"\n",
    r"\d": "[0-9]",
    r"\D": "[^0-9]",
    r"\w": "[0-9A-Za-z_]",
    r"\W": "[^0-9A-Za-z_]",
}
#: White space between the reasoning and the answer, or between the answer's parts.
_GAP = r"/[ \n]{0,4}/"
#: Calls in one answer, where several may be made.
_MAX_CALLS = 32


@dataclass(frozen=True, slots=True)
class Form:
    """The form of an answer."""

    #: Rules, `body` among them. Or a whole grammar, if `is_whole`.
    rules: str
    is_whole: bool = False


@dataclass(frozen=True, slots=True)
class Thinking:
    """The reasoning before the answer."""

    #: The tags as terms of a grammar.
    opener: str
    closer: str
    #: The closer's text, where it is not a special token.
    closer_text: str | None
    #: Whether the prompt has opened it; else the model may.
    is_open: bool


def literal(text: str) -> str:
    """Return the term for exactly this text."""
    # A literal cannot contain U+007F itself.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", r"\u007f")


def special(token_id: int) -> str:
    """Return the term for a special token."""
    return f"<[{token_id}]>"


def json_rule(
    name: str,
    schema: dict[str, Any],
    *,
    is_lenient: bool,
    whitespace: str | None = None,
    is_compact: bool = False,
) -> str:
    """Return a rule for the JSON that satisfies `schema`.

    `is_lenient`: leave out the parts that cannot be enforced, with a warning. `whitespace`: a
    pattern of the white space in JSON. Raises `ValueError` for a schema that is too deep, or not
    JSON.
    """
    if whitespace and not _WHITE.fullmatch(whitespace):
        raise ValueError("has a whitespace_pattern that matches more than JSON's white space")
    white = whitespace.replace(r"\s", r"[ \t\n\r]") if whitespace else _WHITESPACE
    # The engine's side translates the schema into one that the library keeps exactly.
    options: dict[str, Any] = {"as_said": True, "whitespace_pattern": white}
    if is_compact:
        options = {"as_said": True, "whitespace_flexible": False}
    if is_lenient:
        options["lenient"] = True
    try:
        text = json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    return f"{name}: %json {text}"


def json_form(
    schema: dict[str, Any],
    *,
    is_lenient: bool,
    whitespace: str | None = None,
    is_compact: bool = False,
) -> Form:
    """Return the form of the JSON that satisfies `schema`; see `json_rule`."""
    rule = json_rule(
        "body", schema, is_lenient=is_lenient, whitespace=whitespace, is_compact=is_compact
    )
    return Form(rule)


def regex_form(pattern: str) -> Form:
    """Return the form of texts that match all of `pattern`."""
    # It is matched as a whole, so outer anchors are redundant; inner ones are refused.
    pattern = pattern.removeprefix("^")
    if pattern.endswith("$") and not _is_escaped(pattern, len(pattern) - 1):
        pattern = pattern[:-1]
    if not pattern:
        return Form('body: ""')
    escaped = re.sub(r"\\.|/|\n", _in_slashes, pattern, flags=re.DOTALL)
    return Form(f"body: /{escaped}/")


def _is_escaped(text: str, at: int) -> bool:
    before = text[:at]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


def _in_slashes(found: re.Match[str]) -> str:
    return _IN_SLASHES.get(found.group(), found.group())


def choice_form(choices: Sequence[str]) -> Form:
    """Return the form of one of these texts."""
    return Form("body: " + " | ".join(map(literal, choices)))


def lark_form(grammar: str) -> Form:
    """Return the form of a grammar with a rule `start`."""
    return Form(grammar, is_whole=True)


def whole(form: Form | None, *, thinking: Thinking | None = None, calls: str = "") -> str:
    """Return the grammar of an output: reasoning, then the form or the calls (rules with `calls`).

    At least one of `form` and `calls` is there.
    """
    if form is not None and form.is_whole and thinking is None and not calls:
        return f"{form.rules}\n{_HEAD}\n"
    if form is not None and form.is_whole:
        outer = "\n".join([_HEAD, *_frame("@inner", thinking, calls)])
        inner = f"{form.rules}\n{_HEAD}\n"
        parts = [{"lark_grammar": outer}, {"name": "inner", "lark_grammar": inner}]
        return json.dumps({"grammars": parts})
    rules = [form.rules] if form is not None else []
    lines = [_HEAD, *_frame("body" if form is not None else "", thinking, calls), *rules]
    return "\n".join(lines) + "\n"


def _frame(body: str, thinking: Thinking | None, calls: str) -> list[str]:
    """Return the rule `start` and the rules it refers to, except `body`."""
    answer = " | ".join(filter(None, (body, "calls" if calls else "")))
    if thinking is None:
        return [f"start: {answer}", *filter(None, [calls])]
    think = "think gap" if thinking.is_open else f"({thinking.opener} think gap)?"
    if thinking.closer_text is None:
        rules = [f"think: /(?s:.*)/ {thinking.closer}"]
    else:
        closer = re.escape(thinking.closer_text).replace("/", r"\/")
        rules = [f"think[lazy]: /(?s:.*){closer}/"]
    lines = [f"start: {think} answer", f"answer: {answer}", f"gap: {_GAP}", *rules]
    return [*lines, *filter(None, [calls])]


def call_rules(
    form: CallForm, tools: Sequence[tuple[str, str]], *, is_single: bool, mark: Callable[[str], str]
) -> str:
    """Return rules with `calls`: one call or several.

    `tools`: names, and the rule for the arguments of each, which is called `arguments_rule(i)`.
    `mark`: gives the term for a part of the form, which may be a special token.
    """

    def terms(parts: Sequence[str]) -> str:
        return " ".join(map(mark, parts))

    more = "" if is_single else f" ({terms(form.between)} call){{0,{_MAX_CALLS - 1}}}"
    lines = [
        " ".join(["calls:", terms(form.opening), "call" + more, terms(form.closing)]),
        f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}",
    ]
    before, between = terms(form.before_name), terms(form.before_arguments)
    for i, (name, rule) in enumerate(tools):
        arguments = f"{between} {arguments_rule(i)} {terms(form.after_arguments)}"
        lines += [f"call_{i}: {before} {literal(name)} {arguments}", rule]
    return "\n".join(lines)


def arguments_rule(i: int) -> str:
    """Return the name of the rule for the arguments of the tool that is `i`th to choose from."""
    return f"arguments_{i}"
