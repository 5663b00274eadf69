"""Each text that a grammar accepts satisfies its schema, by another reading of the standard.

The schemas are random, of keywords that are hard to keep. Answers come from the real masks, drawn
with a bias to break out. They are changed byte by byte while the grammar accepts the changed ones
too. `jsonschema` judges them: numbers as decimals, repeated keys both ways.
"""

from __future__ import annotations

import decimal
import json
import os
import random
import signal
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from model.grammar.grammars import Compiler, GrammarError
from model.interface import Vocabulary
from server.structured.grammar import json_form, whole

#: Numbers, texts, parts of patterns ... that have been taken for others somewhere.
_HARD = json.loads((Path(__file__).parents[2] / "data" / "hard_to_keep.json").read_text())
_PIECES = [*(bytes([byte]) for byte in range(256)), *(one.encode() for one in _HARD["joints"])]
_END = len(_PIECES)
_MAX_TOKENS = 160
#: Tokens with which a model may break out.
_EVIL = frozenset([*b'"\\,:}]{[u0n./-e9 \x7f\n', *range(256, _END), 0xC3, 0xE2, 0xF0])
_CLOSING = frozenset(b'"}]')
#: Parts of patterns that Python reads otherwise, or warns of.
_IN_PYTHON = {
    "(?<n>": "(?:",
    "[[]": r"[\[]",
    "[&&a]": "[&a]",
    "[~~]": "[~]",
    r"[\w-.]": r"[\w.\-]",
}


def _pattern(chance: random.Random) -> str:
    def branch() -> str:
        parts = range(chance.randint(1, 3))
        return "".join(
            chance.choice(_HARD["atoms"]) + chance.choice(_HARD["quantifiers"]) for _ in parts
        )

    text = "|".join(branch() for _ in range(chance.choice([1, 1, 1, 2])))
    if "|" in text:
        text = f"(?:{text})" if chance.random() < 0.7 else text
    return chance.choice(["^{}$", "^{}$", "^{}", "{}$", "{}"]).replace("{}", text)


def _value(chance: random.Random, depth: int = 2) -> Any:
    kinds = [
        "text",
        "text",
        "number",
        "number",
        "null",
        "flag",
        *(["list", "object"] if depth else []),
    ]
    match chance.choice(kinds):
        case "text":
            return chance.choice(_HARD["texts"])
        case "number":
            return chance.choice(_HARD["numbers"])
        case "null":
            return None
        case "flag":
            return chance.random() < 0.5
        case "list":
            return [_value(chance, depth - 1) for _ in range(chance.randint(0, 2))]
        case _:
            names = chance.sample(_HARD["names"], chance.randint(0, 2))
            return {name: _value(chance, depth - 1) for name in names}


def _some(chance: random.Random, share: float, **keys: Callable[[], Any]) -> dict[str, Any]:
    return {key: make() for key, make in keys.items() if chance.random() < share}


class _Schemas:
    """Makes schemas; `refs` are the possible values of `$ref`."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.refs = [
            "#",
            "#/$defs/one",
            "#/$defs/two",
            "#/definitions/a~1b",
            "#/x/0",
            "#/$defs/none",
        ]

    def root(self, kind: int) -> dict[str, Any]:
        """Return one of any kind; of texts and their patterns; of numbers."""
        chance = self._chance
        if kind == 1:
            return self._string() if chance.random() < 0.7 else self._object(0)
        schema = dict(self._number() if kind == 2 else self.schema(3))
        text = json.dumps(schema)
        if "$ref" in text:
            schema["$defs"] = {"one": self.schema(1), "two": self.schema(1)}
            schema["definitions"], schema["x"] = {"a/b": self.schema(1)}, [self.schema(1)]
        if chance.random() < 0.1:
            schema["$schema"] = "http://json-schema.org/draft-07/schema#"
        return schema

    def schema(self, depth: int) -> dict[str, Any]:
        chance = self._chance
        kinds = ["number", "number", "string", "string", "constant", "formed", "plain"]
        if depth:
            kinds += ["object", "object", "object", "array", "array", "either", "all", "ref", "one"]
        make: dict[str, Callable[[], dict[str, Any]]] = {
            "number": self._number,
            "string": self._string,
            "constant": self._constant,
            "formed": lambda: {"type": "string", "format": chance.choice(_HARD["formats"])},
            "plain": lambda: chance.choice(
                [{"type": ["integer", "null"]}, {"type": "boolean"}, {}]
            ),
            "object": lambda: self._object(depth - 1),
            "array": lambda: self._array(depth - 1),
            "either": lambda: {"anyOf": [self.schema(depth - 1) for _ in range(2)]},
            "one": lambda: {"oneOf": [self.schema(depth - 1) for _ in range(2)]},
            "all": lambda: self._all(depth - 1),
            "ref": lambda: {
                "$ref": chance.choice(self.refs[:5]),
                **_some(chance, 0.2, minLength=lambda: 1),
            },
        }
        made = make[chance.choice(kinds)]()
        if chance.random() < 0.02:
            made[chance.choice(["not", "uniqueItems", "propertyNames", "contains"])] = (
                chance.choice([{}, False])
            )
        return made

    def _number(self) -> dict[str, Any]:
        chance = self._chance

        def some() -> Any:
            return chance.choice(_HARD["numbers"])

        made = {
            "type": chance.choice(["integer", "number", ["number", "string"]]),
            **_some(chance, 0.4, minimum=some, maximum=some),
            **_some(chance, 0.2, exclusiveMinimum=some, exclusiveMaximum=some),
            **_some(chance, 0.2, multipleOf=lambda: chance.choice(_HARD["factors"])),
        }
        if chance.random() < 0.05:
            del made["type"]
        return made

    def _string(self) -> dict[str, Any]:
        chance = self._chance
        return {
            **({"type": "string"} if chance.random() < 0.9 else {}),
            **_some(chance, 0.7, pattern=lambda: _pattern(chance)),
            **_some(chance, 0.2, minLength=lambda: chance.randint(0, 3)),
            **_some(chance, 0.3, maxLength=lambda: chance.randint(0, 5)),
        }

    def _constant(self) -> dict[str, Any]:
        chance = self._chance
        if chance.random() < 0.5:
            return {"const": _value(chance)}
        return {"enum": [_value(chance) for _ in range(chance.randint(1, 3))]}

    def _object(self, depth: int) -> dict[str, Any]:
        chance = self._chance
        names = chance.sample(_HARD["names"], chance.randint(0, 3))
        made: dict[str, Any] = {
            "type": "object",
            "properties": {name: self.schema(depth) for name in names},
            "required": [one for one in names if chance.random() < 0.5],
        }
        if chance.random() < 0.15:
            made["required"].append(chance.choice(_HARD["names"]))
        if chance.random() < 0.25:
            made["patternProperties"] = {_pattern(chance): self.schema(depth)}
        made.update(_some(chance, 0.12, minProperties=lambda: chance.randint(0, 3)))
        made.update(_some(chance, 0.1, maxProperties=lambda: chance.randint(0, 3)))
        match chance.randint(0, 3):
            case 0 | 1:
                made["additionalProperties"] = False
            case 2:
                made["additionalProperties"] = self.schema(depth)
            case _:
                pass
        return made

    def _array(self, depth: int) -> dict[str, Any]:
        chance = self._chance
        made: dict[str, Any] = {"type": "array", "maxItems": chance.randint(0, 3)}
        made.update(_some(chance, 0.3, minItems=lambda: chance.randint(0, 2)))
        match chance.randint(0, 3):
            case 0:
                made["prefixItems"] = [self.schema(depth) for _ in range(2)]
                made.update(
                    _some(chance, 0.6, items=lambda: chance.choice([False, self.schema(0)]))
                )
            case 1:
                return {
                    "items": [self.schema(depth)],
                    "allOf": [made],
                    "additionalItems": chance.choice([False, self.schema(0)]),
                    "$schema": "http://json-schema.org/draft-07/schema#",
                }
            case _:
                made["items"] = self.schema(depth)
        return made

    def _all(self, depth: int) -> dict[str, Any]:
        kinds: list[Callable[[], Any]] = [self._number, self._string, partial(self._object, depth)]
        kind = self._chance.choice(kinds)
        return {**kind(), "allOf": [kind() for _ in range(self._chance.randint(1, 2))]}


class _Answers:
    """Answers that one grammar lets end."""

    def __init__(self, compiler: Compiler, grammar: str, chance: random.Random) -> None:
        self._start, self._chance = compiler.compile(grammar), chance

    def drawn(self) -> bytes | None:
        """Draw one; None if it does not end."""
        chance, matcher, text = self._chance, self._start.matcher(), b""
        evil = chance.choice([0.0, 1.0, 6.0])
        for position in range(_MAX_TOKENS):
            mask = matcher.compute_bitmask()
            if matcher.is_error():
                return None
            allowed = [one for one in range(_END + 1) if mask[one >> 3] >> (one & 7) & 1]
            if not allowed:
                return None
            if allowed[-1] == _END and chance.random() < 0.5:
                return text
            closing = position / 20
            weights = [1 + evil * (one in _EVIL) + closing * (one in _CLOSING) for one in allowed]
            [token] = chance.choices(allowed, weights)
            if token == _END:
                return text
            matcher.consume_token(token)
            text += _PIECES[token]
        return None

    def takes(self, text: bytes) -> bool:
        matcher = self._start.matcher()
        return matcher.try_consume_tokens(list(text)) == len(text) and bool(matcher.is_accepting())

    def changed(self, text: bytes, num_tries: int) -> Iterator[bytes]:
        """Yield texts near an answer that are accepted too."""
        chance = self._chance
        for _ in range(num_tries):
            at = chance.randint(0, len(text))
            end = min(len(text), at + chance.choice([0, 0, 1, 1, 2]))
            other = text[:at] + chance.choice(_HARD["changes"]).encode() + text[end:]
            if other != text and self.takes(other):
                yield other
                text = other if chance.random() < 0.5 else text


def _exact(digits: str) -> Decimal:
    with suppress(decimal.InvalidOperation):
        return Decimal(digits)
    # Of more places than even this can count; only where no bound holds.
    return Decimal("-Infinity" if digits[0] == "-" else "Infinity")


def _read(text: bytes, *, is_first: bool) -> Any:
    """Read JSON with exact numbers; of a key that repeats the first or the last."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        return dict(reversed(found) if is_first else found)

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    read = json.loads(
        text.decode(), parse_float=_exact, parse_constant=no_constant, object_pairs_hook=pairs
    )
    # Lone surrogates cannot be encoded.
    json.dumps(read, ensure_ascii=False, default=str).encode()
    return read


def _faults(schema: dict[str, Any], text: bytes) -> str:
    """Return the fault of an answer, or nothing."""
    exact = _walk(json.loads(json.dumps(schema), parse_float=Decimal))
    judge = jsonschema.validators.validator_for(exact, jsonschema.Draft202012Validator)
    judged = judge(exact, format_checker=judge.FORMAT_CHECKER)
    try:
        for is_first in (False, True):
            judged.validate(_read(text, is_first=is_first))
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return ""


def _walk(node: Any) -> Any:
    if isinstance(node, list):
        return [_walk(one) for one in node]
    if not isinstance(node, dict):
        return node
    walked: dict[str, Any] = {}
    for key, value in node.items():
        if key == "pattern" and isinstance(value, str):
            walked[key] = _python_pattern(value)
        elif key == "patternProperties":
            walked[key] = {_python_pattern(name): _walk(one) for name, one in value.items()}
        elif key in {"const", "enum"}:
            walked[key] = value
        else:
            walked[key] = _walk(value)
    return walked


def _python_pattern(pattern: str) -> str:
    # Its $ is before a line break at the end, too.
    text = pattern[:-1] + r"\Z" if pattern.endswith("$") else pattern
    for ecma, python in _IN_PYTHON.items():
        text = text.replace(ecma, python)
    return text


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    ends = array("I")
    for piece in [*_PIECES, b"<end>"]:
        ends.append((ends[-1] if ends else 0) + len(piece))
    return Compiler(Vocabulary(b"".join([*_PIECES, b"<end>"]), ends, (_END,), (_END,)))


def _survives(compiler: Compiler, grammar: str) -> bool:
    """Return whether compiling is short and ends no process, within limits as the server's."""
    pid = os.fork()
    if pid == 0:
        signal.setitimer(signal.ITIMER_PROF, 2)
        with suppress(GrammarError):
            compiler.compile(grammar)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def _try(compiler: Compiler, seed: int, told: Counter[str]) -> list[str]:
    """Try one schema; count the result and return the faults."""
    chance = random.Random(seed)
    schema = _Schemas(chance).root(seed % 3)
    try:
        grammar = whole(json_form(schema, is_lenient=False))
        if not _survives(compiler, grammar):
            told["refused as too complex"] += 1
            return []
        answers = _Answers(compiler, grammar, chance)
    except GrammarError as error:
        told["refused by place" if str(error)[0] == "/" else "refused by the library"] += 1
        return []
    told["kept"] += 1
    wrong: list[str] = []
    for text in filter(None, (answers.drawn() for _ in range(3))):
        for one in (text, *answers.changed(text, 40)):
            told["answers"] += 1
            if fault := _faults(schema, one):
                wrong.append(f"{seed}: {json.dumps(schema)} lets {one!r} end: {fault}")
    return wrong


def _try_all(compiler: Compiler, seeds: range, num_answers: int) -> None:
    told: Counter[str] = Counter()
    wrong: list[str] = []
    with decimal.localcontext(decimal.Context(prec=700)):
        for seed in seeds:
            wrong += _try(compiler, seed, told)
    sys.stdout.write(f"{dict(told)}\n")
    assert not wrong, f"{len(wrong)} of {told}:\n" + "\n".join(wrong[:20])
    assert told["answers"] >= num_answers
    assert told["kept"] >= len(seeds) / 3


def test_no_answer_that_ends_is_invalid(compiler: Compiler) -> None:
    _try_all(compiler, range(125), 500)


@pytest.mark.slow
def test_no_answer_that_ends_is_invalid_for_long(compiler: Compiler) -> None:
    _try_all(compiler, range(125, 1125), 10_000)
