"""The grammars themselves, followed by hand: byte by byte, with the library the engine uses."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest

from model.grammar.grammars import Compiler, GrammarError
from model.interface import Vocabulary
from server.structured.grammar import (
    Form,
    Thinking,
    arguments_rule,
    call_rules,
    choice_form,
    json_form,
    json_rule,
    lark_form,
    literal,
    regex_form,
    special,
    whole,
)
from server.tools.declared import SYNTAXES
from server.tools.events import ArgumentsDelta, CallEnded, CallStarted, joined
from server.tools.output_parser import OutputParser, OutputSyntax
from server.tools.syntaxes import BARE, DEEPSEEK, MISTRAL

#: All bytes, then <think> and </think> as special tokens, then the end.
OPEN, CLOSE, END = 256, 257, 258
SCHEMAS = json.loads((Path(__file__).parents[2] / "data" / "schemas.json").read_text())
#: Keywords that cannot be enforced, and a word of the library's message.
UNENFORCED = {
    "oneOf with overlap": "oneOf",
    "propertyNames": "propertyNames",
    "dependentRequired": "dependentRequired",
    "if then else": "if",
    "not": "not",
    "uniqueItems": "uniqueItems",
    "contains": "contains",
    "format unknown": "phone",
    "pattern with lookahead": "look",
    "invoice of pydantic": "look",
}
TINY = json_form({"const": 1}, is_lenient=False)


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    pieces = [*(bytes([byte]) for byte in range(256)), b"<think>", b"</think>", b"<end>"]
    ends = array("I")
    for piece in pieces:
        ends.append((ends[-1] if ends else 0) + len(piece))
    return Compiler(Vocabulary(b"".join(pieces), ends, (OPEN, CLOSE, END), (END,)))


def accepts(compiler: Compiler, grammar: str, *texts: str | int) -> bool:
    """Return whether the grammar lets the texts (and special tokens) end."""
    matcher = compiler.compile(grammar).matcher()
    for text in texts:
        tokens = [text] if isinstance(text, int) else list(text.encode())
        if not matcher.consume_tokens(tokens):
            return False
    return bool(matcher.is_accepting())


@pytest.mark.parametrize("case", SCHEMAS, ids=lambda case: case["name"])
def test_a_schema_is_kept_or_refused_by_name(compiler: Compiler, case: Any) -> None:
    grammar = whole(json_form(case["schema"], is_lenient=False))
    if case["name"] in UNENFORCED:
        with pytest.raises(GrammarError, match=UNENFORCED[case["name"]]):
            compiler.compile(grammar)
        return
    assert compiler.warnings(grammar) == []
    for indent in (None, 2):
        assert accepts(compiler, grammar, json.dumps(case["valid"], indent=indent))
    if "invalid" in case:
        assert not accepts(compiler, grammar, json.dumps(case["invalid"]))


@pytest.mark.parametrize("case", SCHEMAS, ids=lambda case: case["name"])
def test_what_is_relaxed_is_named(compiler: Compiler, case: Any) -> None:
    grammar = whole(json_form(case["schema"], is_lenient=True))
    expected = UNENFORCED.get(case["name"], "")
    if expected == "look":
        with pytest.raises(GrammarError):
            compiler.compile(grammar)
    else:
        assert expected in " ".join(compiler.warnings(grammar))
        assert bool(expected) == bool(compiler.warnings(grammar))
        assert accepts(compiler, grammar, json.dumps(case["valid"]))


_POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
_LABEL = {"properties": {"label": {"type": "string"}}}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (_POINT, '{"x": 1}', '{"x": 1, "z": 1}'),
        ({**_POINT, "required": ["y"]}, '{"y": [{"z": 1}]}', '{"y": 1, "z": 1}'),
        ({"allOf": [_POINT, _LABEL]}, '{"x": 1, "label": ""}', '{"x": 1, "z": 1}'),
        ({**_LABEL, "allOf": [_POINT]}, '{"label": "", "x": 1}', '{"x": 1, "z": 1}'),
        ({"anyOf": [_POINT, {"type": "null"}]}, '{"x": 1}', '{"x": 1, "z": 1}'),
        ({**_LABEL, "anyOf": [_POINT]}, '{"label": "", "x": 1}', '{"x": 1, "z": 1}'),
        (
            {"$ref": "#/$defs/p", "$defs": {"p": {"properties": {"p": {"$ref": "#/$defs/p"}}}}},
            '{"p": {"p": {}}}',
            '{"p": {"z": {}}}',
        ),
    ],
)
@pytest.mark.parametrize("is_lenient", [True, False])
def test_a_property_that_is_not_named_is_written_where_the_schema_says_so_alone(
    compiler: Compiler, schema: Any, good: str, bad: str, is_lenient: bool
) -> None:
    grammar = whole(json_form(schema, is_lenient=is_lenient))
    assert accepts(compiler, grammar, good)
    assert not accepts(compiler, grammar, bad)
    for rest in (True, {"type": ["integer", "object"]}):
        said = {**_POINT, "additionalProperties": rest}
        grammar = whole(json_form(said, is_lenient=is_lenient))
        assert accepts(compiler, grammar, '{"x": 1, "z": 1}')


@pytest.mark.parametrize("text", ['{  "a": 1}', '{\n\n"a": 1}', ' {"a": 1}', '{"a": 1}\n'])
def test_blanks_do_not_go_on_for_ever(compiler: Compiler, text: str) -> None:
    grammar = whole(json_form({"type": "object"}, is_lenient=False))
    assert accepts(compiler, grammar, '{"a": 1}')
    assert accepts(compiler, grammar, '{"a":1}')
    assert not accepts(compiler, grammar, text)


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        ("^a/b$", "a/b", "a"),
        (r"a\$", "a$", "a"),
        (r"a\\$", "a\\", "a$"),
        (r"[/\]]+", "/]", "a"),
        ("a\nb", "a\nb", "ab"),
        ('"\\d+"', '"12"', "12"),
        (r"\d[\d-]", "1-", "\u06611"),
        (r"\w\W\D", "a b", "é b"),
        ("", "", "a"),
        ("é{2}", "éé", "é"),
    ],
)
def test_a_pattern_means_the_whole(compiler: Compiler, pattern: str, good: str, bad: str) -> None:
    grammar = whole(regex_form(pattern))
    assert accepts(compiler, grammar, good)
    assert not accepts(compiler, grammar, bad)


def _thinking(*, is_special: bool, is_open: bool) -> Thinking:
    if is_special:
        return Thinking(special(OPEN), special(CLOSE), None, is_open)
    return Thinking(literal("<think>"), literal("</think>"), "</think>", is_open)


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize(
    "form",
    [TINY, choice_form(["1", "2"]), lark_form('start: "1" | two\ntwo: "2"')],
    ids=["json", "choice", "lark"],
)
def test_the_form_begins_behind_the_reasoning(
    compiler: Compiler, form: Form, is_special: bool
) -> None:
    opener, closer = (OPEN, CLOSE) if is_special else ("<think>", "</think>")
    opened = whole(form, thinking=_thinking(is_special=is_special, is_open=True))
    assert accepts(compiler, opened, "so <b>\n{3", closer, "\n\n1")
    assert accepts(compiler, opened, closer, "1")
    assert not accepts(compiler, opened, "1")
    assert not accepts(compiler, opened, "so", closer, "3")
    may_open = whole(form, thinking=_thinking(is_special=is_special, is_open=False))
    assert accepts(compiler, may_open, opener, "so", closer, "1")
    assert accepts(compiler, may_open, "1")
    assert not accepts(compiler, may_open, "so", closer, "1")


@pytest.mark.parametrize(
    ("syntax", "template"),
    [
        *((syntax, "") for syntax in dict.fromkeys([*SYNTAXES.values(), BARE]) if syntax),
        (MISTRAL, "[ARGS]"),
        (DEEPSEEK, "```json"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
@pytest.mark.parametrize("num_calls", [1, 2])
def test_calls_are_written_as_they_are_read(
    compiler: Compiler, syntax: Any, template: str, num_calls: int
) -> None:
    form = syntax.form_in({"default": template})
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tools = [("f", json_rule(arguments_rule(0), schema, is_lenient=False))]
    rules = call_rules(form, tools, is_single=False, mark=literal)
    single = call_rules(form, tools, is_single=True, mark=literal)
    one = [*form.before_name, "f", *form.before_arguments, '{"a": 1}', *form.after_arguments]
    calls = [*one, *([*form.between, *one] if num_calls == 2 else [])]
    text = "".join([*form.opening, *calls, *form.closing])
    assert accepts(compiler, whole(None, calls=rules), text)
    assert accepts(compiler, whole(None, calls=single), text) == (num_calls == 1)
    assert not accepts(compiler, whole(None, calls=rules), text.replace("1", "true"))
    assert not accepts(compiler, whole(None, calls=rules), text.replace("f", "g"))
    parser = OutputParser(OutputSyntax(syntax, tool_names=frozenset({"f"})))
    call = [CallStarted("f"), ArgumentsDelta('{"a": 1}'), CallEnded()]
    assert joined(parser.push(text) + parser.finish()) == call * num_calls


def test_a_special_mark_is_a_token(compiler: Compiler) -> None:
    form = MISTRAL.form_in({})
    tools = [("f", json_rule(arguments_rule(0), {}, is_lenient=False))]
    mark = {"[TOOL_CALLS]": special(OPEN)}
    rules = call_rules(form, tools, is_single=True, mark=lambda text: mark.get(text, literal(text)))
    assert accepts(compiler, whole(None, calls=rules), OPEN, '[{"name": "f", "arguments": {}}]')
