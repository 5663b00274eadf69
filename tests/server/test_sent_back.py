"""Answers can be sent back, and a client's JSON stays text where the server need not read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.load import ModelText
from server.text.template import ChatTemplate

Speaking = Callable[..., Any]

TOOL = {"name": "f", "parameters": {"type": "object"}}
USER = {"role": "user", "content": "x"}
#: How templates show arguments: as JSON, as a string of JSON, and one by one.
TEMPLATES = {
    "json": "{{ call.arguments | tojson }}",
    "ascii": "{{ call.arguments | tojson(ensure_ascii=true) }}",
    "as it is": "{{ call.arguments if call.arguments is string else call.arguments | tojson }}",
    "one by one": "{% for k, v in call.arguments | items %}"
    "{{ k }}={{ v if v is string else v | tojson }};{% endfor %}",
    "whole": "{{ call | tojson }}",
}
_TEMPLATE = """\
{%- if tools %}<tool_call>{{ tools | tojson }}{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}
{%- for c in m.tool_calls or [] %}{% set call = c.function %}HERE{% endfor %}
{%- endfor %}"""
#: Texts that a model may write as the object of a call.
ANSWERED = {
    "half a pair": r'{"a": "\ud83d"}',
    "the other half": r'{"a": "x\ude00y", "\udc00": 1}',
    "a pair": r'{"a": "\ud83d\ude00"}',
    "an escape that is none": r'{"a": "\\ud83d"}',
    "many digits": '{"a": ' + "1" * 5000 + "}",
    "beyond a float": '{"a": 1e999, "b": -1e999, "c": 1e-999}',
    "beyond 64 bits": '{"a": 36893488147419103232}',
    "deep": '{"a": ' + "[" * 98 + "]" * 98 + "}",
    "twice the same key": '{"a": 1, "a": 2}',
    "nothing": "{}",
    "a zero byte": r'{"a": "\u0000"}',
}
#: Texts that a client may have from elsewhere.
SENT = {
    **ANSWERED,
    "brackets without end": "[" * 1000,
    "objects without end": '{"a":' * 100_000,
    "deeper than Python goes": '{"a": ' + "[" * 5000 + "]" * 5000 + "}",
    "deep enough to hurt later": '{"a": ' + "[" * 600 + "]" * 600 + "}",
    "NaN": '{"a": NaN, "b": -Infinity}',
    "no JSON": "rm -rf {",
    "empty": "",
    "a number": "1" * 5000,
    "a word": "null",
    "a list": "[1]",
    "a string": r'"\ud83d"',
}


def _template(kind: str) -> str:
    return _TEMPLATE.replace("HERE", TEMPLATES[kind])


def _said(arguments: str) -> str:
    return f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'


def _body(answer: Any, about: str = "") -> dict[str, Any]:
    assert answer.status_code == 200, (about, answer.text)
    body: dict[str, Any] = answer.json()
    return body


def _post(live: Any, path: str, body: dict[str, Any]) -> Any:
    # As most clients write it: JSON has no other form of half a pair.
    content = json.dumps(body, ensure_ascii=True).encode()
    return live.http.post(path, content=content)


@pytest.fixture(params=TEMPLATES)
def live(request: pytest.FixtureRequest, speaking: Speaking) -> Any:
    """A server whose model writes each call in turn, and a word after each."""
    outputs = [output for call in ANSWERED.values() for output in (_said(call), "ok")]
    return _roomy(speaking(*outputs, template=_template(request.param)))


def _roomy(live: Any) -> Any:
    live.client.info = replace(live.client.info, max_model_len=10**7)
    return live


def test_a_chats_answers_can_be_sent_back(live: Any) -> None:
    asked = {"messages": [USER], "tools": [{"type": "function", "function": TOOL}]}
    for name in ANSWERED:
        answer = _body(_post(live, "/v1/chat/completions", asked))
        message = answer["choices"][0]["message"]
        [call] = message["tool_calls"]
        result = {"role": "tool", "tool_call_id": call["id"], "content": "done"}
        again = {**asked, "messages": [USER, message, result]}
        body = _body(_post(live, "/v1/chat/completions", again), name)
        assert body["octavo"]["warnings"] == []


@pytest.mark.parametrize("is_stored", [True, False])
def test_responses_can_be_gone_on_from(live: Any, *, is_stored: bool) -> None:
    asked = {"tools": [{"type": "function", **TOOL}]}
    for name in ANSWERED:
        first = _body(_post(live, "/v1/responses", {**asked, "input": "x"}))
        [call] = first["output"]
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "done"}
        again: dict[str, Any] = {**asked, "input": [USER, call, result]}
        if is_stored:
            again = {**asked, "input": [result], "previous_response_id": first["id"]}
        _body(_post(live, "/v1/responses", again), name)
        _body(live.http.get(f"/v1/responses/{first['id']}"), name)


def test_messages_can_be_sent_back(live: Any) -> None:
    tool = {"name": "f", "input_schema": {"type": "object"}}
    for name in ANSWERED:
        asked = {"messages": [USER], "tools": [tool], "max_tokens": 9}
        answer = live.post("/v1/messages", **asked)
        assert answer.status_code == 200, answer.text
        # As it came: not every client parses the JSON that it passes on, as Python's would.
        blocks = answer.text.partition('"content":')[2].partition(',"stop_reason"')[0]
        call_id = blocks.partition('"id":"')[2].partition('"')[0]
        result = {"type": "tool_result", "tool_use_id": call_id, "content": "done"}
        answered = {"role": "assistant", "content": 0}
        asked["messages"] = [USER, answered, {"role": "user", "content": [result]}]
        content = json.dumps(asked).replace('"content": 0', f'"content": {blocks}')
        body = _body(live.http.post("/v1/messages", content=content.encode()), name)
        told = [warning["param"] for warning in body["octavo"]["warnings"]]
        is_changed = name in {"half a pair", "the other half", "many digits"}
        assert told == ["*"] * is_changed, name


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/tokenize"])
def test_arguments_are_text_where_the_template_can_do_with_text(
    speaking: Speaking, kind: str, path: str
) -> None:
    live = _roomy(speaking("y", template=_template(kind)))
    for name, arguments in SENT.items():
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        item = {"type": "function_call", "call_id": "1", "name": "f", "arguments": arguments}
        body: dict[str, Any] = {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}
        if path == "/v1/responses":
            body = {"input": [USER, item]}
        answer = _post(live, path, body)
        if kind == "one by one" and name not in ANSWERED:
            # It has no place for anything but an object, and reports that.
            assert answer.status_code in {200, 400}, (name, answer.text)
            assert answer.status_code == 200 or answer.json()["error"]["param"], name
        else:
            _body(answer, name)


def test_a_half_of_a_pair_is_replaced_in_messages_and_told(speaking: Speaking) -> None:
    live = speaking("y", template=_template("json"))
    cut = {"role": "user", "content": "cut \ud83d here, but \\ud83d and \U0001f600 are whole"}
    body = _body(_post(live, "/v1/chat/completions", {"messages": [cut]}))
    [warning] = body["octavo"]["warnings"]
    assert warning["param"] == "*"
    assert "U+FFFD" in warning["message"]
    [request] = live.client.requests
    shown = live.text.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
    assert "cut \ufffd here, but \\ud83d and \U0001f600 are whole" in shown


def test_a_number_too_long_to_be_read_is_told_by_its_field(
    start_server: Callable[..., Any],
) -> None:
    content = b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"1" * 5000 + b"}"
    answer = start_server().http.post("/v1/chat/completions", content=content)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "seed"


@pytest.mark.parametrize(
    "schema",
    [
        '{"maximum": 1e999}',
        '{"maximum": NaN}',
        '{"maximum": 36893488147419103232}',
        '{"maximum": ' + "1" * 5000 + "}",
        '{"title": "\\ud83d"}',
        '{"enum": ' + "[" * 150 + "]" * 150 + "}",
        '{"maximum": 1, "maximum": 2}',
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_schema_of_a_tool_harms_nobody(
    speaking: Speaking, path: str, schema: str, choice: str
) -> None:
    live = _roomy(speaking(_said("{}"), template=_template("json")))
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {
            "messages": [USER],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": "HERE"}}],
            "tool_choice": choice,
        },
        "/v1/responses": {
            "input": "x",
            "tools": [{"type": "function", "name": "f", "parameters": "HERE"}],
            "tool_choice": choice,
        },
        "/v1/messages": {
            "messages": [USER],
            "max_tokens": 9,
            "tools": [{"name": "f", "input_schema": "HERE"}],
            "tool_choice": {"type": "any" if choice == "required" else choice},
        },
    }
    content = json.dumps(bodies[path]).replace('"HERE"', schema).encode()
    answer = live.http.post(path, content=content)
    assert answer.status_code in {200, 400}, answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["param"], answer.text


_TEXTS = st.text(st.characters(codec=None), max_size=8)
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**4299, max_value=10**4301)
    | st.floats()
    | _TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner, max_size=3),
    max_leaves=8,
)


def _written(value: Any) -> str:
    """Return it as JSON; Python would not write numbers of so many digits."""
    if isinstance(value, dict):
        members = (f"{json.dumps(key)}: {_written(inner)}" for key, inner in value.items())
        return "{" + ", ".join(members) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**4299:
        return "1" + "0" * 4400
    return json.dumps(value)


@pytest.fixture(scope="module")
def templates() -> dict[str, ChatTemplate]:
    return {
        kind: ChatTemplate(
            {"default": _template(kind)}, special_tokens={}, now=lambda: datetime.now(tz=UTC)
        )
        for kind in TEMPLATES
    }


_OBJECTS = st.dictionaries(_TEXTS, _JSON, max_size=3).map(_written)


@settings(max_examples=200, deadline=None)
@given(arguments=_OBJECTS | _TEXTS.map(lambda text: text.lstrip("{")))
def test_whatever_arguments_are_they_become_tokens(
    templates: dict[str, ChatTemplate], text: ModelText, arguments: str
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages: list[dict[str, Any]] = [USER, {"role": "assistant", "tool_calls": [call]}]
    for kind, template in templates.items():
        if kind == "one by one" and not arguments.startswith("{"):
            continue
        shown = template.render(messages, quote=text.tokenizer.quote)
        assert text.tokenizer.encode(shown, add_special_tokens=False, is_quoted=True)
