"""Every way to ask for a form, through the HTTP side; the fake model honours masks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,6}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mood": {"enum": ["good", "bad"]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}
CHAT, PLAIN = "chat/completions", "completions"
LARK = 'start: greeting " " NAME\ngreeting: "hi" | "hello"\nNAME: /[A-Z][a-z]{2,4}/'
EBNF = 'root ::= greeting " " [A-Z] [a-z]\ngreeting ::= "hi" | "hello"'


@pytest.fixture(scope="module")
def model(start_shared: Callable[..., Any]) -> Any:
    return start_shared()


def ask(model: Any, route: str = CHAT, **body: Any) -> Any:
    asked = {"prompt": "x"} if route == PLAIN else {"messages": [{"role": "user", "content": "x"}]}
    return model.post(f"/v1/{route}", **{"max_tokens": 200, **asked, **body})


def text_of(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    assert choice["finish_reason"] == "stop"
    text: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return text


def strict(schema: Any) -> dict[str, Any]:
    named = {"name": "it", "strict": True, "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


@pytest.mark.parametrize("route", [CHAT, PLAIN])
@pytest.mark.parametrize(
    "body",
    [
        strict(SCHEMA),
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": "[ ]?"}},
        {"guided_json": SCHEMA},
    ],
    ids=["response_format", "structured_outputs", "in a string", "white space", "guided"],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_json_satisfies_its_schema(model: Any, route: str, body: Any, seed: int) -> None:
    text = text_of(ask(model, route, seed=seed, n=1, **body))
    jsonschema.validate(json.loads(text), SCHEMA)


def test_without_white_space_there_is_none(model: Any) -> None:
    outputs = {"json": SCHEMA, "disable_any_whitespace": True}
    assert " " not in text_of(ask(model, structured_outputs=outputs))


@pytest.mark.parametrize("alias", [True, False])
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("regex", r"^[ab]{3}/\d\.$", r"[ab]{3}/\d\."),
        ("choice", ["yes", 'no "never"', "maybe/\n"], 'yes|no "never"|maybe/\n'),
        ("choice", ["\x7f\x01\x85\u2028"], "\x7f\x01\x85\u2028"),
        ("grammar", LARK, "(hi|hello) [A-Z][a-z]{2,4}"),
        ("grammar", EBNF, "(hi|hello) [A-Z][a-z]"),
    ],
)
def test_other_forms(model: Any, name: str, value: Any, expected: str, alias: bool) -> None:
    body = {f"guided_{name}": value} if alias else {"structured_outputs": {name: value}}
    assert re.fullmatch(expected, text_of(ask(model, **body)))


@pytest.mark.parametrize(
    "body",
    [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}],
)
def test_any_object_is_one_or_is_cut(model: Any, body: Any) -> None:
    answer = ask(model, max_tokens=60, **body)
    assert answer.status_code == 200
    [choice] = answer.json()["choices"]
    text = choice["message"]["content"]
    assert text.startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(text), dict)
    else:
        assert choice["finish_reason"] == "length"


def test_text_is_free(model: Any) -> None:
    free = ask(model, max_tokens=9, seed=1).json()["choices"]
    assert ask(model, max_tokens=9, response_format={"type": "text"}).json()["choices"] == free


def test_the_end_comes_before_min_tokens_if_it_must(model: Any) -> None:
    assert text_of(ask(model, guided_choice=["a"], min_tokens=50)) == "a"


def test_each_of_several_answers_has_the_form(model: Any) -> None:
    choices = ask(model, n=4, guided_regex="[ab]{9}").json()["choices"]
    assert len(choices) == 4
    assert all(re.fullmatch("[ab]{9}", choice["message"]["content"]) for choice in choices)


def test_what_is_not_strict_is_relaxed_and_said(model: Any) -> None:
    schema = {"type": "array", "items": {"enum": ["a"]}, "maxItems": 2, "uniqueItems": True}
    wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    answer = ask(model, response_format=wanted)
    assert set(json.loads(text_of(answer))) <= {"a"}
    [warning] = answer.json()["octavo"]["warnings"]
    assert warning["param"] == "response_format.json_schema.schema"
    assert "uniqueItems" in warning["message"]


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        (strict({"uniqueItems": True}), "response_format.json_schema.schema", "uniqueItems"),
        (strict({"type": "strin"}), "response_format.json_schema.schema", "strin"),
        (strict({"x-guidance": {}}), "response_format", "x-guidance"),
        (strict({"items": {"not": {}}}), "response_format.json_schema.schema", "/items/not"),
        ({"guided_json": {"const": 2**60 + 1}}, "guided_json", "/const"),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": "x"}},
            "structured_outputs",
            "whitespace_pattern",
        ),
        (strict({"$ref": "https://x.y/z"}), "response_format.json_schema.schema", "x.y"),
        ({"guided_json": "{"}, "guided_json", "JSON"),
        ({"guided_json": {"enum": []}}, "guided_json", "guided_json"),
        ({"guided_regex": "(?=a)b"}, "guided_regex", "look"),
        ({"guided_regex": "("}, "guided_regex", "unclosed"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar", "nothing"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar", "llama.cpp"),
        ({"guided_grammar": '%llguidance {}\nstart: "a"'}, "guided_grammar", "own"),
        ({"guided_choice": []}, "guided_choice", "guided_choice"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"structural_tag": "x"}}, None, "structural_tag"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"guided_regex": "a", "guided_json": {}}, None, "exclude"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "end"),
        ({"guided_json": {"enum": ["x" * 600_000]}}, "guided_json", "too large"),
    ],
)
def test_what_cannot_be_is_told(model: Any, body: Any, param: str | None, said: str) -> None:
    answer = ask(model, **body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert said in error["message"]
    assert param is None or error["param"] == param
