"""Closing schemas: no value more, never none where there were some, no key without a name."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import jsonschema
import pytest

from model.grammar.closed_objects import close_objects

_NAMES = "abc"
_VALUES: list[Any] = [1, "x", {}, {"a": 1}, {"b": 1}, {"a": "x", "b": 1}]
_NUM_SCHEMAS = 300


def _documents() -> list[dict[str, Any]]:
    """Return all objects of these names and values."""
    choices = itertools.product([None, *_VALUES], repeat=len(_NAMES))
    pairs = (zip(_NAMES, values, strict=True) for values in choices)
    return [{name: value for name, value in one if value is not None} for one in pairs]


class _Schemas:
    """Makes schemas that apply together in every way."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        #: No value would satisfy a circle.
        self._refs = ["#/$defs/none"]

    def root(self) -> dict[str, Any]:
        """Return a schema of objects."""
        defs: dict[str, Any] = {}
        for name in ("one", "two"):
            defs[name] = self._schema(1)
            self._refs.append(f"#/$defs/{name}")
        return {**self._schema(3), "$defs": defs}

    def _schema(self, depth: int) -> dict[str, Any]:
        chance = self._chance
        if not depth:
            return chance.choice([{}, {"type": "integer"}, {"type": "object"}, {"const": "x"}])
        made = self._object(depth - 1) if chance.random() < 0.7 else {}
        for key in ("allOf", "anyOf", "oneOf"):
            if chance.random() < 0.2:
                made[key] = [self._schema(depth - 1) for _ in range(chance.randint(1, 2))]
        if chance.random() < 0.2:
            made["$ref"] = chance.choice(self._refs)
        return made

    def _object(self, depth: int) -> dict[str, Any]:
        chance = self._chance
        made: dict[str, Any] = {}
        if chance.random() < 0.8:
            names = chance.sample(_NAMES, chance.randint(0, 3))
            made["properties"] = {name: self._schema(depth) for name in names}
        if chance.random() < 0.4:
            made["required"] = chance.sample(_NAMES, chance.randint(1, 2))
        if chance.random() < 0.15:
            made["patternProperties"] = {chance.choice(["^a", "b", "c$"]): self._schema(depth)}
        if chance.random() < 0.15:
            made["minProperties"] = chance.randint(0, 3)
        if chance.random() < 0.2:
            rest = [True, False, {}, self._schema(depth)]
            made["additionalProperties"] = chance.choice(rest)
        if chance.random() < 0.05:
            made["unevaluatedProperties"] = False
        if chance.random() < 0.05:
            made["dependentSchemas"] = {"a": self._schema(depth)}
        return made


def _valid(schema: dict[str, Any], documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # References without a target are refused elsewhere.
    schema["$defs"].setdefault("none", {})
    judge = jsonschema.Draft202012Validator(schema)
    return [document for document in documents if judge.is_valid(document)]


def test_what_satisfies_the_closed_schema_satisfies_the_open_one() -> None:
    documents, num_closed = _documents(), 0
    for seed in range(_NUM_SCHEMAS):
        chance = random.Random(seed)
        schema = _Schemas(chance).root()
        closed = copy.deepcopy(schema)
        close_objects(closed)
        num_closed += closed != schema
        some = chance.sample(documents, 60)
        kept = _valid(closed, some)
        allowed = _valid(schema, some)
        assert all(one in allowed for one in kept), (seed, schema, closed)
        if allowed and not kept:
            # Rare, so that only then all are tried.
            assert _valid(closed, documents), (seed, schema, closed)
    assert num_closed > _NUM_SCHEMAS / 4


_A = {"type": "object", "properties": {"a": {"type": "integer"}}}
_B = {"type": "object", "properties": {"b": {"type": "integer"}}}
_DEFS = {"$defs": {"A": _A}}


def _kind(value: str, name: str) -> dict[str, Any]:
    kind = {"kind": {"const": value}, name: {}}
    return {"type": "object", "properties": kind, "required": ["kind"]}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (_A, {"a": 1}, {"a": 1, "z": 1}),
        ({"properties": {"o": _A}}, {"o": {"a": 1}}, {"o": {"z": 1}}),
        ({"type": "array", "items": _A}, [{"a": 1}], [{"z": 1}]),
        ({"properties": {}}, {}, {"z": 1}),
        ({**_A, "required": ["b"]}, {"a": 1, "b": [1]}, {"b": 1, "z": 1}),
        ({"allOf": [_A, _B]}, {"a": 1, "b": 2}, {"a": 1, "z": 1}),
        ({"allOf": [_A]}, {"a": 1}, {"z": 1}),
        ({"anyOf": [_A, {"type": "null"}]}, {"a": 1}, {"a": 1, "z": 1}),
        ({"anyOf": [_A, {**_B, "required": ["b"]}]}, {"b": 1}, {"b": 1, "a": "x"}),
        ({**_A, "anyOf": [{"required": ["a"]}, _B]}, {"a": 1, "b": 1}, {"a": 1, "z": 1}),
        (
            {"oneOf": [_kind("x", "a"), _kind("y", "b")]},
            {"kind": "y", "b": 1},
            {"kind": "y", "a": 1},
        ),
        ({"$ref": "#/$defs/A", **_DEFS}, {"a": 1}, {"z": 1}),
        (
            {"$ref": "#/$defs/A", "properties": {"c": {}}, "$defs": {"A": _A}},
            {"a": 1, "c": 2},
            {"z": 1},
        ),
        ({"properties": {"a": {}}, "patternProperties": {"^x-": {}}}, {"a": 1, "x-b": 1}, {"z": 1}),
    ],
)
def test_what_a_schema_does_not_name_is_not_written(schema: Any, good: Any, bad: Any) -> None:
    closed = copy.deepcopy(schema)
    close_objects(closed)
    judge, before = jsonschema.Draft202012Validator(closed), jsonschema.Draft202012Validator(schema)
    assert before.is_valid(bad)
    assert not judge.is_valid(bad)
    assert judge.is_valid(good)


_TWICE = {"allOf": [{"properties": {"o": _A}}, {"properties": {"o": _B}}]}


@pytest.mark.parametrize(
    ("schema", "document"),
    [
        ({"type": "object"}, {"z": 1}),
        ({"type": "object", "required": ["a"]}, {"a": 1, "z": 1}),
        ({**_A, "additionalProperties": True}, {"a": 1, "z": 1}),
        ({**_A, "additionalProperties": {"type": "integer"}}, {"a": 1, "z": 1}),
        ({**_A, "minProperties": 2}, {"a": 1, "z": 1}),
        ({**_A, "const": {"z": 1}}, {"z": 1}),
        ({**_A, "unevaluatedProperties": True}, {"z": 1}),
        ({"allOf": [_A, {"additionalProperties": True}]}, {"z": 1}),
        ({**_TWICE, "required": ["o"]}, {"o": {"a": 1, "b": 2}}),
    ],
)
def test_what_says_that_it_is_open_stays_open(schema: Any, document: Any) -> None:
    closed = copy.deepcopy(schema)
    close_objects(closed)
    assert jsonschema.Draft202012Validator(closed).is_valid(document)


def test_a_schema_of_itself_ends() -> None:
    for schema in (
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"properties": {"a": {"$ref": "#"}}, "anyOf": [{"$ref": "#"}]},
    ):
        close_objects(schema)
