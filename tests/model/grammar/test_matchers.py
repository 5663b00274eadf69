"""Grammars through the real sampler: random schemas and logits, and all that can be in the way."""

from __future__ import annotations

import json
import threading
from array import array
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.grammar import matchers
from model.grammar.grammars import MAX_CACHED, Compiler, GrammarError, Grammars
from model.interface import Constraint, SamplingParams, SlotStart, StepOutput, Vocabulary
from model.sampling.sampler import Sampler

_JOINTS = ('{"', '"}', '":', '": ', '", "', "},", "],", '[{"', "true", "false", "null", "ab", "12")
_PIECES = [*(bytes([byte]) for byte in range(256)), *(joint.encode() for joint in _JOINTS)]
END = len(_PIECES)
#: Ids behind the vocabulary's end: models round up.
VOCAB_SIZE = END + 30
TIMEOUT_S = 20.0
#: Alternatives of which each token must rule out many.
_SLOW = "start: /(?s:.*)a(.|\\n){500}/"


def _vocabulary() -> Vocabulary:
    pieces = [*_PIECES, b"<end>", *[b""] * (VOCAB_SIZE - END - 1)]
    ends = array("I")
    for piece in pieces:
        ends.append((ends[-1] if ends else 0) + len(piece))
    return Vocabulary(b"".join(pieces), ends, (END,), (END,))


COMPILER = Compiler(_vocabulary())


def _grammar(schema: Any) -> str:
    options = {"x-guidance": {"whitespace_pattern": "[ ]"}}
    text = json.dumps({**schema, **options})
    return f'%llguidance {{"no_forcing": true}}\nstart: %json {text}'


class Rows:
    """A sampler, and sequences in its slots; logits are a function of the sequence alone."""

    def __init__(self, num_slots: int = 4, mask_timeout_s: float = TIMEOUT_S) -> None:
        device = torch.device("cpu")
        self.sampler = Sampler(num_slots, VOCAB_SIZE, (END,), device, mask_timeout_s=mask_timeout_s)
        self.outputs: dict[int, list[int]] = {}

    def start(
        self, slot: int, grammar: str | None, had: tuple[int, ...] = (), **params: Any
    ) -> None:
        sampling = SamplingParams(max_tokens=1000, grammar=grammar, **params)
        constraint = None if grammar is None else COMPILER.compile(grammar)
        self.sampler.start(SlotStart(slot, sampling, [1, 2], had, constraint))
        self.outputs[slot] = list(had)

    def step(self, *slots: int, logits: torch.Tensor | None = None) -> StepOutput:
        if logits is None:
            logits = torch.stack([self._logits(self.outputs[slot]) for slot in slots])
        positions = [2 + len(self.outputs[slot]) for slot in slots]
        output = self.sampler.sample(logits, list(slots), positions)
        self.sampler.check()
        for slot, tokens in zip(slots, output.token_ids, strict=True):
            self.outputs[slot] += tokens
        return output

    def _logits(self, had: list[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash(tuple(had)) % 2**63)
        # Closing tokens become likelier as the sequence grows, so that it ends.
        logits = torch.randn(VOCAB_SIZE, generator=generator) * 3
        closing = [END, *map(ord, '"}]'), _PIECES.index(b'"}')]
        logits[closing] += 0.2 * len(had)
        return logits

    def run(self, slot: int, max_tokens: int = 400) -> bytes:
        """Go on to the end; return the text."""
        while self.outputs[slot][-1:] != [END] and len(self.outputs[slot]) < max_tokens:
            output = self.step(slot)
            assert output.failures == {}
        assert self.outputs[slot][-1] == END, "it does not end"
        return b"".join(_PIECES[token] for token in self.outputs[slot][:-1])


@pytest.fixture
def rows() -> Iterator[Rows]:
    made = Rows()
    yield made
    made.sampler.close()


_SCALARS = st.sampled_from(
    [
        {"type": "integer", "minimum": -5, "maximum": 40},
        {"type": "number"},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "maxLength": 8},
        {"type": "string", "pattern": "^[a-c]+x?$"},
        {"enum": ["red", 7, None]},
        {"const": {"a": [1]}},
    ]
)


def _composed(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(st.sampled_from("abcd"), inner, max_size=3)
    return st.one_of(
        st.builds(
            lambda each, optional: {
                "type": "object",
                "properties": each,
                "required": [name for name in each if name not in optional],
                "additionalProperties": False,
            },
            properties,
            st.sets(st.sampled_from("abcd")),
        ),
        st.builds(lambda each: {"type": "array", "items": each, "maxItems": 3}, inner),
        st.builds(lambda either: {"anyOf": either}, st.lists(inner, min_size=1, max_size=3)),
    )


@given(
    st.recursive(_SCALARS, _composed, max_leaves=5),
    st.sampled_from([{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.2}]),
    st.sampled_from(
        [
            {},
            {"repetition_penalty": 1.5, "presence_penalty": 1.0},
            {"logit_bias": ((ord("x"), 100.0), (ord("{"), -100.0))},
            {"min_tokens": 30},
            {"logprobs": 2},
        ]
    ),
    st.integers(0, 2**32),
)
@settings(max_examples=60)
def test_what_ends_satisfies_its_schema(schema: Any, draw: Any, edits: Any, seed: int) -> None:
    rows = Rows()
    try:
        rows.start(0, _grammar(schema), seed=seed, **draw, **edits)
        jsonschema.validate(json.loads(rows.run(0)), schema)
    finally:
        rows.sampler.close()


OBJECT = _grammar(
    {
        "type": "object",
        "properties": {"a": {"type": "string", "maxLength": 30}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
)


@pytest.mark.parametrize("num_had", [1, 5, 20])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"seed": 3, "presence_penalty": 0.5}])
def test_who_comes_back_goes_on_as_undisturbed(rows: Rows, num_had: int, params: Any) -> None:
    rows.start(0, OBJECT, **params)
    whole = rows.run(0)
    had = tuple(rows.outputs[0][:num_had])
    rows.start(1, None)
    rows.start(2, OBJECT, had, **params)
    assert rows.run(2) == whole


def test_rows_do_not_know_of_each_other(rows: Rows) -> None:
    rows.start(0, OBJECT, seed=5)
    rows.start(1, None, seed=6)
    alone = [(rows.step(0).token_ids[0], rows.step(1).token_ids[0]) for _ in range(8)]
    rows.start(0, OBJECT, seed=5)
    rows.start(1, None, seed=6)
    rows.start(2, 'start: "ab"+', temperature=0.0)
    beside = [rows.step(0, 1, 2).token_ids[:2] for _ in range(8)]
    assert beside == [list(pair) for pair in alone]


def test_probabilities_are_of_the_raw_logits(rows: Rows) -> None:
    rows.start(0, 'start: "a"', logprobs=1, temperature=0.0)
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 7] = 10.0
    output = rows.step(0, logits=logits.clone())
    [[entry]] = output.logprobs
    assert output.token_ids == [[ord("a")]]
    assert entry.token_id == ord("a")
    assert entry.logprob == pytest.approx(logits.log_softmax(-1)[0, ord("a")].item(), abs=1e-4)
    assert entry.top[0][0] == 7


def test_the_end_is_forced_where_min_tokens_would_forbid_it(rows: Rows) -> None:
    rows.start(0, 'start: "ab"', min_tokens=50)
    assert rows.run(0) == b"ab"


def test_min_tokens_hold_where_the_grammar_can_go_on(rows: Rows) -> None:
    rows.start(0, 'start: "a"+', min_tokens=50, temperature=0.0)
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, END] = 10.0
    for _ in range(50):
        assert rows.step(0, logits=logits.clone()).token_ids != [[END]]
    assert rows.step(0, logits=logits.clone()).token_ids == [[END]]


class _Gate:
    """Holds workers back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._is_open = threading.Event()
        follow = matchers._SlotMatcher._next_mask

        def wait(follower: matchers._SlotMatcher) -> matchers.TokenMask:
            assert self._is_open.wait(TIMEOUT_S)
            return follow(follower)

        monkeypatch.setattr(matchers._SlotMatcher, "_next_mask", wait)

    def open(self) -> None:
        self._is_open.set()


def test_a_mask_that_is_late_delays_its_own_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = _Gate(monkeypatch)
    rows = Rows(mask_timeout_s=0.0)
    rows.start(0, 'start: "ab"', presence_penalty=1.0)
    rows.start(1, None, presence_penalty=1.0)
    for _ in range(3):
        late, other = rows.step(0, 1).token_ids
        assert late == []
        assert other != []
    gate.open()
    rows.sampler._matchers._mask_timeout_s = TIMEOUT_S
    assert rows.run(0) == b"ab"
    rows.sampler.close()


def test_a_grammar_that_fails_ends_its_own_row_alone(
    rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> matchers.TokenMask:
        raise RuntimeError("broken")

    rows.start(1, None)
    rows.start(2, 'start: "a"')
    rows.step(2)
    monkeypatch.setattr(matchers._SlotMatcher, "_next_mask", fail)
    rows.start(0, 'start: "a"')
    output = rows.step(0, 1)
    assert output.token_ids[0] == []
    assert output.token_ids[1] != []
    assert output.failures == {0: "the grammar failed: RuntimeError"}


def test_tokens_that_never_followed_the_grammar_fail(rows: Rows) -> None:
    rows.start(0, 'start: "ab"', (ord("b"),))
    output = rows.step(0)
    assert output.token_ids == [[]]
    assert "cannot be followed" in output.failures[0]


def test_a_mask_that_takes_too_long_ends_its_request(
    rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matchers, "MAX_MASK_S", 0.0)
    rows.start(0, _SLOW)
    assert "too complex" in rows.step(0).failures[0]


def test_who_was_slow_once_is_served_by_the_slow_worker(
    rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matchers, "_SLOW_S", 0.0)
    rows.start(0, 'start: "ab"')
    assert not rows.sampler._matchers._slow._threads
    assert rows.run(0) == b"ab"
    assert rows.sampler._matchers._slow._threads


def test_nothing_left_that_is_allowed_is_an_error_not_a_wrong_token(rows: Rows) -> None:
    rows.start(0, 'start: "a"', temperature=0.0)
    output = rows.step(0, logits=torch.full((1, VOCAB_SIZE), -torch.inf))
    assert output.token_ids == [[]]
    assert "no token is left" in output.failures[0]


# ---- compiling -----------------------------------------------------------------------------------


@pytest.fixture
def grammars() -> Iterator[Grammars]:
    made = Grammars()
    yield made
    made.close()


def _wait(future: Future[Constraint]) -> Constraint:
    return future.result(TIMEOUT_S)


def test_equal_grammars_are_compiled_once(grammars: Grammars) -> None:
    grammars.set_vocabulary(_vocabulary())
    first = _wait(grammars.prepare('start: "a"'))
    assert _wait(grammars.prepare('start: "a"')) is first
    for i in range(MAX_CACHED):
        _wait(grammars.prepare(f'start: "{i}"'))
    assert len(grammars._cached) == MAX_CACHED
    assert _wait(grammars.prepare('start: "a"')) is not first


def test_a_bad_grammar_is_not_remembered(grammars: Grammars) -> None:
    with pytest.raises(GrammarError, match="vocabulary"):
        _wait(grammars.prepare('start: "a"'))
    grammars.set_vocabulary(_vocabulary())
    _wait(grammars.prepare('start: "a"'))
    with pytest.raises(GrammarError, match="unknown name"):
        _wait(grammars.prepare("start: nothing"))


def test_a_vocabulary_that_cannot_be_used_says_why(grammars: Grammars) -> None:
    grammars.set_vocabulary(replace(_vocabulary(), eos_token_ids=(VOCAB_SIZE + 5,)))
    for _ in range(2):
        with pytest.raises(GrammarError, match=str(VOCAB_SIZE + 5)):
            _wait(grammars.prepare('start: "a"'))


class _Panic(BaseException):
    """As the library's are."""


def test_a_panic_of_the_library_is_the_grammars(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(*_: object) -> None:
        raise _Panic("index out of bounds")

    grammars.set_vocabulary(_vocabulary())
    monkeypatch.setattr(Compiler, "compile", panic)
    with pytest.raises(GrammarError, match="index out of bounds"):
        _wait(grammars.prepare('start: "a"'))


def test_a_grammar_is_tried_out() -> None:
    COMPILER.try_out(COMPILER.compile(OBJECT))
    with pytest.raises(GrammarError):
        COMPILER.compile('start: a\na: a "x"')
