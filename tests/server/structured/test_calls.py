"""Calls that a request insists on: in each model's own words, with arguments by their schema."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import jsonschema
import pytest

from model.fake import FakeRunner
from server.text.load import ModelText
from server.text.template import ChatTemplate

HERMES = "{% if tools %}<tool_call>{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
TEMPLATES = {
    "hermes": HERMES,
    "llama": HERMES.replace("<tool_call>", "<|python_tag|>"),
    "mistral": HERMES.replace("<tool_call>", "[TOOL_CALLS]"),
    "mistral, later": HERMES.replace("<tool_call>", "[TOOL_CALLS]name[ARGS]"),
    "none": "{% for m in messages %}{{ m.content }}{% endfor %}",
}
THINKING = HERMES + "{# </think> #}<think>\n"


def _tool(name: str, schema: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema, **more}}


COLOR = {
    "type": "object",
    "properties": {"color": {"$ref": "#/$defs/color"}, "n": {"type": "integer", "maximum": 9}},
    "required": ["color", "n"],
    "additionalProperties": False,
    "$defs": {"color": {"enum": ["red", "blue"]}},
}
SIZE: dict[str, Any] = {
    "properties": {"size": {"enum": ["s", "l"]}},
    "required": ["size"],
    "additionalProperties": False,
}
NONE = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [_tool("paint", COLOR, strict=True), _tool("cut", SIZE), _tool("stop", None)]
SCHEMAS = {"paint": COLOR, "cut": SIZE, "stop": NONE}

Starting = Callable[[str], Any]


@pytest.fixture
def starting(start_server: Callable[..., Any], text: ModelText) -> Starting:
    def start(source: str) -> Any:
        words = ChatTemplate(
            {"default": source}, special_tokens={}, now=lambda: datetime.now(tz=UTC)
        )
        runner = FakeRunner(vocab_size=300, max_model_len=2048, num_pages=600, is_strict=False)
        return start_server(
            runner=runner,
            words=replace(text, template=words),
            model={"tools_in_prompt": "off"},
        )

    return start


def _named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _ask(live: Any, content: str, **body: Any) -> Any:
    answer = live.chat(content, **{"max_tokens": 200, "tools": TOOLS, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def _calls(choice: Any) -> list[Any]:
    """Return the calls in a choice that was not cut, each checked against its tool's schema."""
    calls: list[Any] = choice["message"]["tool_calls"]
    for call in calls:
        function = call["function"]
        jsonschema.validate(json.loads(function["arguments"]), SCHEMAS[function["name"]])
    assert not choice["message"].get("content")
    assert "octavo" not in choice
    return calls


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("content", ["a", "b", "c"])
def test_a_required_call_is_made(starting: Starting, source: str, content: str) -> None:
    live = starting(source)
    body = _ask(live, content, tool_choice="required", parallel_tool_calls=False)
    [choice] = body["choices"]
    assert len(_calls(choice)) == 1
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_named_tool_is_called_once_and_ends_as_openai_says(
    starting: Starting, source: str, name: str
) -> None:
    [choice] = _ask(starting(source), "x", tool_choice=_named(name))["choices"]
    [call] = _calls(choice)
    assert call["function"]["name"] == name
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_several_calls_may_be_made(starting: Starting, source: str) -> None:
    live = starting(source)
    counts = set()
    for content in "abcdefgh":
        [choice] = _ask(live, content, tool_choice="required", max_tokens=1500)["choices"]
        if choice["finish_reason"] == "tool_calls":
            counts.add(len(_calls(choice)))
        else:
            assert choice["finish_reason"] == "length"
    assert max(counts) > 1


def test_a_model_without_tools_is_not_shown_them_and_says_so(starting: Starting) -> None:
    body = _ask(starting(TEMPLATES["none"]), "x", tool_choice=_named("cut"))
    assert [warning["param"] for warning in body["octavo"]["warnings"]] == ["tools"]


def test_what_is_enforced_is_not_warned_of(starting: Starting) -> None:
    live = starting(HERMES)
    assert _ask(live, "x", tool_choice=_named("paint"))["octavo"]["warnings"] == []
    free = _ask(live, "x", max_tokens=3)["octavo"]["warnings"]
    assert [warning["param"] for warning in free] == ["tools.0.function.strict"]


@pytest.mark.parametrize(
    ("tool", "said"),
    [
        (_tool("f", {"type": "string"}), "type object"),
        (_tool("f", {"properties": {"a": {"type": "nothing"}}}), "nothing"),
        (_tool("f", {"x-guidance": {}}), "x-guidance"),
        (_tool("f", {"not": {}}, strict=True), "not"),
        (_tool("f", {"properties": {"a": {"const": 10**30}}}, strict=True), "/properties/a/const"),
    ],
)
@pytest.mark.parametrize("before", [[], TOOLS], ids=["alone", "the fourth"])
def test_a_schema_that_cannot_be_enforced_is_refused_by_its_place(
    starting: Starting, tool: Any, said: str, before: list[Any]
) -> None:
    answer = starting(HERMES).chat("x", tools=[*before, tool], tool_choice="required")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == f"tools.{len(before)}.function.parameters"
    assert error["message"].startswith(error["param"])
    assert said in error["message"]


@pytest.mark.parametrize("content", "abcdef")
def test_arguments_that_are_not_named_are_not_written(starting: Starting, content: str) -> None:
    open_size = {key: value for key, value in SIZE.items() if key != "additionalProperties"}
    body = {"tools": [_tool("cut", open_size)], "tool_choice": _named("cut")}
    [choice] = _ask(starting(HERMES), content, **body)["choices"]
    assert len(_calls(choice)) == 1


def test_of_a_form_and_tools_the_one_at_fault_is_named(starting: Starting) -> None:
    live = starting(HERMES)
    bad = {"type": "object", "properties": {"a": {"type": "nothing"}}}
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": SIZE}}
    answer = live.chat("x", tools=[*TOOLS, _tool("f", bad)], response_format=form)
    assert answer.json()["error"]["param"] == "tools.3.function.parameters"
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": bad}}
    answer = live.chat("x", tools=TOOLS, response_format=form)
    assert answer.json()["error"]["param"] == "response_format.json_schema.schema"


def test_reasoning_comes_first(starting: Starting) -> None:
    live = starting(THINKING)
    wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": SIZE}}
    # Of all it may think, the fake model does not find the end; `test_grammar.py` does by hand.
    body = _ask(live, "x", tools=None, response_format=wanted, max_tokens=50)
    [choice] = body["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["reasoning_content"]
    assert not choice["message"]["content"]


def test_a_form_and_tools_allow_either(starting: Starting) -> None:
    live = starting(TEMPLATES["mistral"])
    wanted = {
        "type": "json_schema",
        "json_schema": {"name": "it", "schema": {**SIZE, "type": "object"}},
    }
    kinds = set()
    for content in ("x" * length for length in range(1, 9)):
        [choice] = _ask(live, content, response_format=wanted, max_tokens=1500)["choices"]
        message = choice["message"]
        if choice["finish_reason"] == "length":
            continue
        kinds.add(choice["finish_reason"])
        if message.get("tool_calls"):
            _calls(choice)
        else:
            jsonschema.validate(json.loads(message["content"]), SIZE)
    assert kinds == {"stop", "tool_calls"}


@pytest.mark.parametrize("choice", ["required", {"type": "custom", "custom": {"name": "dates"}}])
def test_a_custom_tool_gets_what_its_expression_matches(starting: Starting, choice: Any) -> None:
    grammar = {"syntax": "regex", "definition": "[0-9]{4}-[0-9]{2}"}
    form = {"type": "grammar", "grammar": grammar}
    tool = {"type": "custom", "custom": {"name": "dates", "format": form}}
    asked = {"tools": [tool], "tool_choice": choice, "parallel_tool_calls": False}
    body = _ask(starting(HERMES), "x", **asked)
    [call] = body["choices"][0]["message"]["tool_calls"]
    assert re.fullmatch(grammar["definition"], call["custom"]["input"])
    assert body["octavo"]["warnings"] == []


def test_a_grammar_that_is_not_enforced_is_named(starting: Starting) -> None:
    grammar = {"syntax": "lark", "definition": 'start: "a"'}
    form = {"type": "grammar", "grammar": grammar}
    tool = {"type": "custom", "custom": {"name": "say", "format": form}}
    [warning] = _ask(starting(HERMES), "x", tools=[tool], max_tokens=3)["octavo"]["warnings"]
    assert warning["param"] == "tools.0.custom.format.grammar"


def test_of_the_allowed_tools_one_is_called(starting: Starting) -> None:
    allowed = {"mode": "required", "tools": [_named("cut")]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    for content in "abc":
        body = _ask(starting(HERMES), content, tool_choice=choice, parallel_tool_calls=False)
        [call] = _calls(body["choices"][0])
        assert call["function"]["name"] == "cut"


_FORMS: list[tuple[str, Any]] = [
    ("response_format", {"type": "json_object"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "it", "schema": SIZE}}),
    ("structured_outputs", {"regex": "[ab]+"}),
    ("guided_choice", ["a", "b"]),
]


@pytest.mark.parametrize("choice", ["required", _named("cut")], ids=["required", "named"])
@pytest.mark.parametrize(("field", "form"), _FORMS, ids=["object", "schema", "regex", "choice"])
def test_a_forced_call_wins_over_a_form_and_says_so(
    starting: Starting, choice: Any, field: str, form: Any
) -> None:
    body = {"tool_choice": choice, "parallel_tool_calls": False, field: form}
    answer = _ask(starting(HERMES), "x", **body)
    assert len(_calls(answer["choices"][0])) == 1
    assert [warning["param"] for warning in answer["octavo"]["warnings"]] == [field]


def test_a_forced_call_wins_over_a_form_of_a_response(starting: Starting) -> None:
    tool = {"type": "function", "name": "cut", "parameters": SIZE}
    form = {"type": "json_schema", "name": "it", "schema": COLOR}
    body = {"input": "x", "tools": [tool], "tool_choice": "required", "text": {"format": form}}
    answer = starting(HERMES).post("/v1/responses", parallel_tool_calls=False, **body)
    assert answer.status_code == 200, answer.text
    [call] = answer.json()["output"]
    jsonschema.validate(json.loads(call["arguments"]), SIZE)
    assert [warning["param"] for warning in answer.json()["octavo"]["warnings"]] == ["text.format"]


def test_a_forced_call_wins_over_a_form_of_a_message(starting: Starting) -> None:
    tool = {"name": "cut", "input_schema": {**SIZE, "type": "object"}}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    form = {"format": {"type": "json_schema", "schema": COLOR}}
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "tools": [tool]}
    asked = {**body, "tool_choice": choice, "output_config": form}
    answer = starting(HERMES).post("/v1/messages", **asked)
    assert answer.status_code == 200, answer.text
    [call] = answer.json()["content"]
    jsonschema.validate(call["input"], SIZE)
    [warning] = answer.json()["octavo"]["warnings"]
    assert warning["param"] == "output_config.format"
