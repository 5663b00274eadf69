"""Grammars that are meant to hurt: a 400 that names the field, while others go on undisturbed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from model.fake import FakeRunner


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


_EITHER = [{"properties": {"a": {"type": "string"}}}, {"properties": {"b": {"type": "integer"}}}]
_MONSTERS: dict[str, dict[str, Any]] = {
    "deeply nested": {"guided_json": _deep(150)},
    "deeply nested, in a string": {
        "guided_json": '{"properties":{"a":' * 20_000 + "{}" + "}}" * 20_000
    },
    "100,000 enum values": {"guided_json": {"enum": [f"value {i}" for i in range(100_000)]}},
    "an exponential product": {"guided_json": {"allOf": [{"anyOf": _EITHER}] * 30}},
    "a schema that is only itself": {"guided_json": {"$ref": "#"}},
    "a circle of schemas": {
        "guided_json": {
            "$ref": "#/$defs/a",
            "$defs": {
                "a": {"allOf": [{"$ref": "#/$defs/b"}, {"$ref": "#/$defs/b"}]},
                "b": {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]},
            },
        }
    },
    "a huge pattern": {"guided_regex": "(a|b)" * 10_000},
    "20,000 properties": {
        "guided_json": {"properties": {f"p{i}": {"type": "integer"} for i in range(20_000)}}
    },
    "a multiple of a prime": {"guided_json": {"type": "integer", "multipleOf": 999_999_937}},
    "patterns that grow": {"guided_json": {"anyOf": [{"pattern": "." * 16_000}] * 25}},
    "a rule that never ends": {"guided_grammar": 'start: a\na: a "x"'},
}


def test_each_is_refused_while_a_stream_goes_on(start_server: Callable[..., Any]) -> None:
    runner = FakeRunner(vocab_size=300, max_model_len=4096, num_pages=2048, is_strict=False)
    live = start_server(runner=runner)
    body = {"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with live.http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        for name, monster in _MONSTERS.items():
            assert next(lines) is not None
            answer = live.post("/v1/completions", prompt="x", **monster)
            assert answer.status_code == 400, name
            [field] = monster
            # The fields of a body that is too deep to be read are unknown.
            assert (answer.json()["error"]["param"] or field).startswith(field), name
    live.grammars.checker.check()
    free = live.post("/v1/completions", prompt="x", guided_choice=["yes"]).json()["choices"]
    assert free[0]["text"] == "yes"


@pytest.mark.parametrize("pattern", ["(a{1000}){1000}", "(((a{0,99}){0,99}){0,99}){0,99}x"])
def test_what_only_looks_monstrous_is_served(live: Any, pattern: str) -> None:
    answer = live.post("/v1/completions", prompt="x", max_tokens=40, guided_regex=pattern)
    [choice] = answer.json()["choices"]
    assert choice["text"].removesuffix("x") == "a" * len(choice["text"].removesuffix("x"))
    assert choice["finish_reason"] == ("stop" if choice["text"].endswith("x") else "length")
