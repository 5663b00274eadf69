"""Bare texts become values of the type in the tool's schema."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.tools.call_writer import CallWriter
from server.tools.events import ArgumentsDelta, CallEnded, CallStarted, Event, joined
from server.tools.output_parser import OutputParser, OutputSyntax
from server.tools.source import Source
from server.tools.spelled import GLM, QWEN_XML
from server.tools.syntaxes import HERMES
from server.tools.typed import typed as typed_json


def typed(text: str, schema: Any, *, is_string: bool | None = None) -> Any:
    return json.loads(typed_json(text, schema, is_string=is_string))


@pytest.mark.parametrize(
    ("text", "schema", "expected"),
    [
        ("42", {"type": "integer"}, 42),
        ("42", {"type": "string"}, "42"),
        ("42", {"type": "number"}, 42),
        ("4.5", {"type": "integer"}, "4.5"),
        (" 42\n", {"type": "integer"}, 42),
        (" x ", {"type": "string"}, " x "),
        ("True", {"type": "boolean"}, True),
        ("true", {"type": "boolean"}, True),
        ("true", {"type": "integer"}, "true"),
        ("null", {"type": ["string", "null"]}, None),
        ("None", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, None),
        ("null", {"type": "string"}, "null"),
        ('{"b": [1]}', {"type": "object"}, {"b": [1]}),
        ('{"b": [1]}', {"type": "string"}, '{"b": [1]}'),
        ("{b}", {"type": "object"}, "{b}"),
        ("[1]", {"type": "array"}, [1]),
        ("red", {"enum": ["red", "blue"]}, "red"),
        ("1", {"enum": ["1", "2"]}, "1"),
        ("1", {"const": 1}, 1),
        ("1", {}, 1),
        ("x", {}, "x"),
        ("x", None, "x"),
        ("NaN", {"type": "number"}, "NaN"),
        ("[" * 100_000, {"type": "array"}, "[" * 100_000),
        ("9" * 5000, {"type": "integer"}, "9" * 5000),
        ("1", {"type": 7, "anyOf": 3, "enum": 4}, 1),
    ],
)
def test_by_schema(text: str, schema: Any, expected: Any) -> None:
    found = typed(text, schema)
    assert found == expected
    assert type(found) is type(expected)


def test_a_mark_beside_it_goes_before_the_schema() -> None:
    assert typed("1", {"type": "integer"}, is_string=True) == "1"
    assert typed("1", {"type": "string"}, is_string=False) == 1
    assert typed("007", {"type": "string"}, is_string=False) == "007"


def test_a_long_number_keeps_its_digits() -> None:
    assert typed_json("123456789012345678901.5", {}) == "123456789012345678901.5"


@given(
    texts=st.lists(st.tuples(st.text(max_size=5), st.text(max_size=9)), max_size=4),
    schema=st.recursive(
        st.sampled_from([None, {"type": "integer"}, {"type": "string"}, {"enum": [1]}, 3]),
        lambda inner: st.fixed_dictionaries({"anyOf": st.lists(inner, max_size=2)}),
        max_leaves=4,
    ),
)
def test_whatever_is_written_it_is_strict_json(texts: list[tuple[str, str]], schema: Any) -> None:
    schemas = {"f": {"properties": {key: schema for key, _ in texts}}}
    events: list[Event] = []
    out = CallWriter(Source(), events, {"f"}, schemas)
    out.start("f", 0)
    for key, text in texts:
        out.value(key, text, 0, is_string=None)
    out.end_members(0)
    written = "".join(event.text for event in events if isinstance(event, ArgumentsDelta))

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({key for key, _ in pairs}) == len(pairs)
        return dict(pairs)

    parsed = json.loads(written, object_pairs_hook=unique)
    assert parsed.keys() == {key for key, _ in texts}


def the_call(syntax: OutputSyntax, output: str) -> tuple[str, str]:
    parser = OutputParser(syntax)
    [started, arguments, ended] = joined(parser.push(output) + parser.finish())
    assert isinstance(started, CallStarted)
    assert isinstance(arguments, ArgumentsDelta)
    assert ended == CallEnded()
    return started.name, arguments.text


@pytest.mark.parametrize(
    ("syntax", "output"),
    [
        (QWEN_XML, "<tool_call>\n<function=f>\n<parameter=a>\n{}\n</parameter>\n</function>"),
        (GLM, "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>"),
    ],
    ids=["qwen", "glm"],
)
@pytest.mark.parametrize("value", ["1", "a\nb", "  x", "</arg_key>", "x <parameter=b>", "é"])
def test_a_string_comes_through_to_the_letter(syntax: Any, output: str, value: str) -> None:
    schemas = {"f": {"properties": {"a": {"type": "string"}}}}
    name, arguments = the_call(OutputSyntax(syntax, schemas=schemas), output.replace("{}", value))
    assert (name, json.loads(arguments)) == ("f", {"a": value})


def test_a_tool_that_was_not_offered_is_told_all_the_same() -> None:
    output = "<tool_call>g<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"
    assert the_call(OutputSyntax(GLM), output) == ("g", '{"a": 1}')


_SPELLED = "<tool_call>\n<function=f>\n<parameter=a>\n{}\n</parameter>\n</function>"


@pytest.mark.parametrize(
    ("syntax", "output"),
    [
        (QWEN_XML, _SPELLED.replace("{}", r'["\ud83d"]')),
        (HERMES, r'<tool_call>{"name": "f", "arguments": "{\"a\": [\"\ud83d\"]}"}</tool_call>'),
        (HERMES, r'<tool_call>{"name": "f", "arguments": {"a": ["\ud83d"]}}</tool_call>'),
    ],
)
def test_half_a_pair_of_surrogates_is_told_as_the_escape_it_was(syntax: Any, output: str) -> None:
    assert the_call(OutputSyntax(syntax), output) == ("f", r'{"a": ["\ud83d"]}')
