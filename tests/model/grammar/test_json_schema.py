"""Schemas that the grammar library would keep otherwise: kept as they say, or refused by place."""

from __future__ import annotations

import json
import time
from array import array
from contextlib import suppress
from typing import Any

import pytest

from model.grammar.grammars import Compiler, GrammarError, translated
from model.grammar.json_patterns import translated as translated_pattern
from model.grammar.json_schema import SchemaError, strict_schema
from model.interface import Vocabulary
from server.structured.grammar import json_form, json_rule, lark_form, whole

I64, U64 = 2**63 - 1, 2**64 - 1
OLD = "http://json-schema.org/draft-07/schema#"


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    pieces = [*(bytes([byte]) for byte in range(256)), b"<end>"]
    ends = array("I")
    for piece in pieces:
        ends.append((ends[-1] if ends else 0) + len(piece))
    return Compiler(Vocabulary(b"".join(pieces), ends, (256,), (256,)))


def _text(pattern: str, **more: Any) -> dict[str, Any]:
    return {"type": "string", "pattern": pattern, **more}


#: Schema, valid answers, invalid answers.
KEPT: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"const": 2**53}, ["9007199254740992"], ["9007199254740993"]),
    ({"const": 3.141592653589793}, ["3.141592653589793"], ["3.14159265358979"]),
    ({"const": 8333040483111652.0}, ["8333040483111652"], ["8333040483111651"]),
    ({"enum": [{"a": [0.1]}, None]}, ['{"a":[0.1]}', "null"], ['{"a":[0.10]}', '{"a":[]}']),
    ({"type": "integer", "minimum": -(2**63), "maximum": I64}, ["5", str(2**62 + 1)], [str(2**63)]),
    ({"type": "integer", "minimum": 0, "maximum": U64}, ["0", str(2**62 + 1)], [str(2**64), "-1"]),
    ({"type": "integer", "minimum": 10**18}, [str(10**18)], [str(10**18 - 1), "5"]),
    ({"type": "integer", "minimum": 2**53 + 1}, [str(2**53 + 3)], [str(2**53)]),
    ({"type": "integer", "exclusiveMinimum": 2**53}, [str(2**53 + 3)], [str(2**53)]),
    ({"type": "integer", "exclusiveMaximum": 3, "minimum": 2}, ["2"], ["3", "1"]),
    ({"type": "integer", "exclusiveMaximum": 2.5, "exclusiveMinimum": 1.5}, ["2"], ["1", "3"]),
    ({"type": "number", "maximum": 1e300}, ["7.5", "-1e9"[:-2]], []),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, ["0.1", "0.5"], ["0", "0.0", "-0"]),
    ({"type": "number", "minimum": -0.5, "exclusiveMaximum": 0}, ["-0.5"], ["0", "-0", "-0.0"]),
    ({"type": "number", "minimum": 5, "exclusiveMinimum": True}, ["5.5"], ["5", "5.0"]),
    ({"type": "number", "multipleOf": 0.01}, ["0.29", "-3"], ["0.295"]),
    ({"type": "string"}, ['"\x80"', '"\\n"'], ['"\\ud83d"', '"\n"', '"\\/"'[:2]]),
    (_text('^[^"<>]{1,3}$'), ['"a"', '"\\n"', '"\\\\"'], ['"\\""', '"<"', '"aaaa"', '"\\u0022"']),
    (_text(r"^[^\\]$"), ['"a"', '"\\""'], ['"\\\\"']),
    (_text(r'^([^"]|[\x00-\x1f])$'), ['"a"'], ['"\\""']),
    (_text(r'^[^a"]$|^\n$'), ['"b"', '"\\n"'], ['"\\""', '"a"']),
    (_text("^.$"), ['"a"', '"\\""'], ['"\\n"', '"\\r"', '"\u2028"']),
    (_text(r"^\S+$"), ['"a\\""', '"é"'], ['"\\n"', '"\xa0"', '"\ufeff"', '"\\u001f"', '"\x85"']),
    (_text(r"^[^\S]$"), ['" "', '"\\t"'], ['"a"', '"\\""']),
    (_text(r"^\d\D\w\W$"), ['"1a_ "'], ['"٣a_ "', '"1٣_ "', '"1aé "', '"1a_é"']),
    (_text(r"^[\w-.]+$"), ['"a-."'], ['"+"']),
    (_text(r"^[[&&a]+$"), ['"[&a"'], ['"b"']),
    (_text(r"^a\/b\-\_$"), ['"a/b-_"'], ['"a\\/b-_"']),
    (_text(r"^a{,2}$".replace("{,2}", "{1,2}?")), ['"a"', '"aa"'], ['"aaa"']),
    (_text("^a|b$"), ['"ac"', '"cb"'], ['"c"']),
    (_text("^é$", maxLength=1), ['"é"'], ['"éé"']),
    ({"const": "\x7f\x01"}, ['"\\u007f\\u0001"'], ['"\x7f\\u0001"']),
    (
        {"properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "integer"}},
        ['{"a":"x","b":1}', '{"b":1}'],
        ['{"a":"x","\\u0061":1}', '{"\\u0061":1}', '{"a":1}'],
    ),
    (
        {"patternProperties": {"^a": {"type": "string"}}, "additionalProperties": {"const": 1}},
        ['{"ab":"x","b":1}'],
        ['{"\\u0061":1}', '{"ab":1}'],
    ),
    (
        {"$schema": OLD, "items": [{"const": 1}], "allOf": [{}], "additionalItems": False},
        ["[1]"],
        ["[1,1]", "[2]"],
    ),
    ({"$schema": OLD, "prefixItems": [True], "items": {"const": 1}}, ["[1]", "2"], ["[2]"]),
    ({"prefixItems": [True], "items": {"const": 1}}, ["[2]", "[2,1]"], ["[2,2]"]),
    ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2023-02-29"', '"1900-02-29"']),
    ({"format": "time"}, ['"23:59:59Z"'], ['"23:59:60Z"', '"10:00:60Z"']),
    ({"format": "date-time"}, ['"2000-02-29T23:59:59Z"'], ['"2001-02-29T23:59:59Z"']),
    ({"type": "array", "uniqueItems": False}, ["[1,1]"], []),
    ({"$ref": "#/x/y~1z/0", "x": {"y/z": [{"enum": [1.0]}]}}, ["1"], ["2", "1.0"]),
]


@pytest.mark.parametrize(("schema", "good", "bad"), KEPT, ids=lambda one: json.dumps(one)[:50])
def test_it_is_kept(
    compiler: Compiler, schema: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    was = json.dumps(schema)
    start = compiler.compile(whole(json_form(schema, is_lenient=False)))
    assert json.dumps(schema) == was, "what the client sent is changed"
    for text in [*good, *bad]:
        matcher = start.matcher()
        whole_text = list(text.encode())
        is_taken = matcher.try_consume_tokens(whole_text) == len(whole_text)
        assert (is_taken and matcher.is_accepting()) == (text in good), text


def _in(schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a b": {"items": schema}}}


#: Schema, and the end of the place where it is refused.
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({"const": one}, "const") for one in (2**53 + 1, I64, 10**30, 1e300, 5e-324, {"a": [U64]})),
    ({"const": 0.30000000000000004}, "const"),
    ({"enum": [1, 1234567890123456789]}, "enum"),
    ({"type": "integer", "minimum": 2**63}, "minimum"),
    ({"type": "number", "maximum": -1e300}, "maximum"),
    *(({"multipleOf": one}, "multipleOf") for one in (0, -1, 0.07, 2**33, 1e-30)),
    ({"multipleOf": 65537, "allOf": [{"multipleOf": 65539}]}, "allOf/0/multipleOf"),
    *((_text(one), "pattern") for one in (r"a\Z", r"\0", "a\0", "[]", "[^]", "a{,3}", "a++")),
    *((_text(one), "pattern") for one in ("(?s:.)", r"(a)\1", r"\x00", "[a--b]", "a" * 20_000)),
    ({"patternProperties": {r"\Z": {}}}, "patternProperties"),
    ({"patternProperties": {"(?<a>b)": {}, "(?:b)": {}}}, "patternProperties"),
    ({"minProperties": 2}, "minProperties"),
    ({"minProperties": 3, "required": ["a", "a", "b"][:2]}, "minProperties"),
    *(({"$ref": one}, "$ref") for one in ("#/nowhere", "#name", "https://x.y/z", "#/properties/0")),
    *(({"$ref": one, "const": {}}, "$ref") for one in ("#/properties", "#/x/const", "#/enum/0")),
    ({"$id": "http://x.y"}, "$id"),
    *(({one: {}}, one) for one in ("not", "if", "contains", "propertyNames", "dependencies")),
    *(({one: "#"}, one) for one in ("$dynamicRef", "$recursiveRef")),
    ({"uniqueItems": True}, "uniqueItems"),
]


@pytest.mark.parametrize(("schema", "place"), REFUSED, ids=lambda one: json.dumps(one)[:50])
def test_it_is_refused_by_its_place(schema: dict[str, Any], place: str) -> None:
    with pytest.raises(GrammarError) as error:
        translated(whole(json_form(_in(schema), is_lenient=False)))
    assert str(error.value).startswith(f"/properties/a b/items/{place} ")
    assert error.value.line == 3


@pytest.mark.parametrize(("schema", "place"), REFUSED, ids=lambda one: json.dumps(one)[:50])
def test_what_is_lenient_loses_it_and_says_so(
    compiler: Compiler, schema: dict[str, Any], place: str
) -> None:
    grammar = whole(json_form(_in(schema), is_lenient=True))
    compiler.compile(grammar)
    told = compiler.warnings(grammar)
    assert f"/properties/a b/items/{place} " in " ".join(told)


def _strict(schema: dict[str, Any], *, is_lenient: bool = False) -> list[str]:
    return strict_schema({**schema, "x-guidance": {"lenient": is_lenient}})


def test_a_control_character_beside_open_names_is_refused() -> None:
    with pytest.raises(SchemaError, match="/properties/a/const has a control character"):
        _strict({"properties": {"a": {"const": "\x7f"}}, "additionalProperties": True})


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [{"a": 0.1}] * 30_000},
        {"allOf": [{"multipleOf": one} for one in range(1, 20_000)]},
        {"anyOf": [{"pattern": "[^a]" * 4000}] * 20},
        {"properties": {f"p{i}": {"type": "number", "minimum": i + 0.1} for i in range(9000)}},
        {"pattern": "(" * 16_000},
        *(
            {"pattern": one * (16_000 // len(one))}
            for one in ("[", "[^", r"\p{", "(?<a", "{1", r"\u{", "a?")
        ),
        {"pattern": "\\" * 15_999},
        {"minimum": 10**4000, "maximum": -(10**4000)},
    ],
    ids=lambda one: json.dumps(one)[:40],
)
@pytest.mark.parametrize("is_lenient", [True, False])
def test_large_ones_take_no_more_than_their_length(schema: Any, *, is_lenient: bool) -> None:
    began_s = time.thread_time()
    with suppress(ValueError):
        _strict(schema, is_lenient=is_lenient)
    # Some 0.3 s on a slow machine; quadratic growth takes tens of seconds.
    assert time.thread_time() - began_s < 4


def test_what_is_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(SchemaError, match="deep"):
        _strict(schema)


def test_a_circle_is_walked_once() -> None:
    either = {"anyOf": [{"$ref": "#"}, {"$ref": "#/$defs/a"}]}
    assert _strict({"$ref": "#/$defs/a", "$defs": {"a": either}}) == []


def test_names_are_read_as_the_standard_says() -> None:
    assert translated_pattern(r"\W", is_exact=True) != translated_pattern(r"\W")


def test_what_is_translated_is_left_as_it_is() -> None:
    grammar, _ = translated(whole(json_form({"pattern": "[^a]"}, is_lenient=False)))
    assert translated(grammar) == (grammar, [])


def test_a_schema_within_a_grammar_of_grammars_is_translated(compiler: Compiler) -> None:
    rule = json_rule("arguments_0", {"const": 2**53 + 1}, is_lenient=False)
    grammar = whole(lark_form('start: "a"'), calls=f"calls: arguments_0\n{rule}")
    with pytest.raises(GrammarError, match="/const"):
        compiler.compile(grammar)
