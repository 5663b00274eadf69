"""A forced token is how every text of the grammar goes on, and masks do not depend on it."""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Iterator
from itertools import accumulate

import jsonschema
import numpy as np
import pytest

from model.grammar.grammars import Compiler
from model.grammar.matchers import Matchers
from model.interface import Vocabulary

_PIECES = [*(bytes([byte]) for byte in range(256)), b'{"', b'":', b"na", b"true", b"xy", b"xyz"]
_END = len(_PIECES)
_HEAD = '%llguidance {"no_forcing": true}\nstart: '
_SCHEMA = {
    "type": "object",
    "properties": {"a_long_name": {"type": "integer"}, "is_it": {"type": "boolean"}},
    "required": ["a_long_name", "is_it"],
    "additionalProperties": False,
}
_TIMEOUT_S = 60.0
_COMPILER = Compiler(
    Vocabulary(
        b"".join(_PIECES), array("I", [*accumulate(map(len, _PIECES)), 268]), (_END,), (_END,)
    )
)


@pytest.fixture
def followed() -> Iterator[Matchers]:
    made = Matchers(_END + 1, mask_timeout_s=_TIMEOUT_S)
    yield made
    made.close()


def _allowed(followed: Matchers) -> list[int]:
    [mask] = followed.masks([0])
    assert mask is not None
    assert not mask.error
    return [int(token) for token in np.flatnonzero(~mask.is_banned)]


@pytest.mark.parametrize("seed", range(4))
def test_forced_tokens_are_how_all_texts_go_on(followed: Matchers, seed: int) -> None:
    grammar = _COMPILER.compile(f"{_HEAD}%json {json.dumps(_SCHEMA)}")
    followed.start(0, grammar, [])
    plain = grammar.matcher()
    chance, text, num_forced = random.Random(seed), b"", 0
    ahead = b""
    while (allowed := _allowed(followed)) != [_END] and len(text) < 500:
        forced = followed.forced(0)
        num_forced += len(forced)
        promised = text + b"".join(_PIECES[token] for token in forced if token != _END)
        ahead = max(ahead, promised, key=len)
        if forced:
            assert forced[0] in allowed
        mask = np.frombuffer(plain.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(mask, bitorder="little")[: _END + 1]
        assert allowed == list(np.flatnonzero(bits)), "a mask depends on forcing"
        # Closing tokens first: numbers and white space need not end.
        token = min((one for one in allowed if one != _END), key=lambda _: chance.random())
        followed.advance([(0, [token])])
        plain.consume_token(token)
        text += _PIECES[token]
        assert ahead.startswith(text) or text.startswith(ahead), "a forced text did not come"
    assert num_forced > 5
    if allowed == [_END]:
        jsonschema.validate(json.loads(text), _SCHEMA)


def test_forcing_beyond_the_limits_harms_no_mask(followed: Matchers) -> None:
    """A million forced bytes are more states than a lexer may have."""
    followed.start(0, _COMPILER.compile(_HEAD + "/(a{1000}){1000}/"), [])
    for _ in range(40):
        followed.forced(0)
        assert _allowed(followed) == [ord("a")]
        followed.advance([(0, [ord("a")])])


def test_without_a_grammar_or_after_a_fault_nothing_is_forced(followed: Matchers) -> None:
    assert followed.forced(0) == []
    followed.start(0, _COMPILER.compile(_HEAD + '"x"'), [ord("?")])
    [mask] = followed.masks([0])
    assert mask is not None
    assert mask.error
    assert followed.forced(0) == []
