"""A row with drafts gives the tokens, log-probabilities and failures that plain rows give."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from model.grammar.grammars import Compiler
from model.grammar.matchers import Matchers
from model.interface import SamplingParams, SlotStart, StepOutput, TokenLogprobs, Vocabulary
from model.sampling.sampler import Sampler

END = 128
VOCAB_SIZE = 130
COMPILER = Compiler(
    Vocabulary(bytes(range(128)) + b"<end>", array("I", [*range(1, 129), 133, 133]), (END,), (END,))
)
NUM_TOKENS = 24
#: By slot: all in one batch.
REQUESTS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"top_p": 0.7},
    {"top_k": 5, "logprobs": 3},
    {"min_p": 0.05, "top_p": 0.9},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7, "temperature": 0.0},
    {"repetition_penalty": 1.6},
    {"repetition_penalty": 0.7, "top_k": 9, "logprobs": 0},
    {"logit_bias": ((7, 9.0), (9, -50.0))},
    {
        "allowed_token_ids": (3, 4, 5),
        "bad_words": ((3, 3), (4,), (5, 3, 5)),
        "presence_penalty": 0.5,
    },
    {"bad_words": tuple((a, b) for a in range(60) for b in range(60) if (a + b) % 3), "top_p": 0.8},
    {"min_tokens": 12, "stop_token_ids": tuple(range(40)), "logprobs": 1},
    {"grammar": 'start: "[" /[a-z]+/ ("," /[a-z]{2,5}/)* "]"', "logprobs": 2},
    # Free text comes first, as of a model that reasons.
    {
        "grammar": 'start: /[^!]*!/ "{" /[0-9]{1,9}/ "}"',
        "temperature": 0.6,
        "logit_bias": ((33, 4.0),),
    },
    {"grammar": "start: /[ab]{9}c{9}/", "bad_words": ((97, 98),), "frequency_penalty": 1.0},
)


class Texts:
    """A sampler and a sequence in each slot, whose logits are a function of its text."""

    def __init__(self, mask_timeout_s: float = 20.0) -> None:
        device = torch.device("cpu")
        self.sampler = Sampler(
            len(REQUESTS),
            VOCAB_SIZE,
            (END,),
            device,
            candidates=(8,),
            mask_timeout_s=mask_timeout_s,
        )
        self.outputs: list[list[int]] = [[] for _ in REQUESTS]
        self.logprobs: list[list[TokenLogprobs]] = [[] for _ in REQUESTS]
        self.failures: dict[int, str] = {}
        self.running = set(range(len(REQUESTS)))
        for slot, request in enumerate(REQUESTS):
            params = SamplingParams(max_tokens=1000, seed=slot, **request)
            grammar = None if params.grammar is None else COMPILER.compile(params.grammar)
            self.sampler.start(SlotStart(slot, params, [1, 2, 2], (), grammar))

    @property
    def unfinished(self) -> list[int]:
        return [
            slot
            for slot, output in enumerate(self.outputs)
            if slot in self.running
            if len(output) < NUM_TOKENS and END not in output and slot not in self.failures
        ]

    def step(self, drafts: dict[int, list[int]]) -> None:
        """Draw for all unfinished slots; slots without an entry in `drafts` have no draft."""
        slots, rows, before = self.unfinished, list[int](), list[list[int]]()
        for slot in slots:
            draft = drafts.get(slot, [])
            rows += [slot] * (len(draft) + 1)
            before += [draft[:count] for count in range(len(draft) + 1)]
        texts = [self.outputs[slot] + draft for slot, draft in zip(rows, before, strict=True)]
        logits = torch.stack([_logits(slot, t) for slot, t in zip(rows, texts, strict=True)])
        positions = [3 + len(text) for text in texts]
        has_drafts = len(rows) > len(slots)
        given = self.sampler.begin(logits, rows, positions, before if has_drafts else None)
        self._take(slots, given.finish())
        self.sampler.check()

    def _take(self, slots: list[int], output: StepOutput) -> None:
        for index, (slot, tokens) in enumerate(zip(slots, output.token_ids, strict=True)):
            # The scheduler drops tokens behind the end.
            end = tokens.index(END) + 1 if END in tokens else len(tokens)
            end = min(end, NUM_TOKENS - len(self.outputs[slot]))
            self.outputs[slot] += tokens[:end]
            if output.logprobs:
                self.logprobs[slot] += output.logprobs[index][:end]
            if index in output.failures:
                self.failures[slot] = output.failures[index]

    def close(self) -> None:
        self.sampler.close()


def _logits(slot: int, text: list[int]) -> torch.Tensor:
    chance = np.random.default_rng([slot, *text])
    logits = torch.from_numpy(chance.standard_normal(VOCAB_SIZE).astype(np.float32)) * 3
    logits[END + 1 :] = -torch.inf
    return logits


@pytest.fixture
def texts() -> Iterator[Texts]:
    made = Texts()
    yield made
    made.close()


@pytest.fixture(scope="module")
def plain() -> Iterator[Texts]:
    made = Texts()
    while made.unfinished:
        made.step({})
    yield made
    made.close()


@pytest.mark.parametrize("num_wrong", [0, 1, 6])
def test_drafts_change_no_token(texts: Texts, plain: Texts, num_wrong: int) -> None:
    num_steps = draft_to_the_end(texts, plain, num_wrong)
    assert texts.outputs == plain.outputs
    assert texts.logprobs == plain.logprobs
    assert texts.failures == plain.failures
    if num_wrong == 0:
        assert num_steps < NUM_TOKENS / 2


def test_a_request_alone_needs_no_other_to_be_settled(texts: Texts, plain: Texts) -> None:
    for slot in range(len(REQUESTS)):
        texts.running = {slot}
        draft_to_the_end(texts, plain, num_wrong=1)
        assert texts.outputs[slot] == plain.outputs[slot], REQUESTS[slot]
        assert texts.logprobs[slot] == plain.logprobs[slot]
    assert texts.failures == plain.failures


def draft_to_the_end(texts: Texts, plain: Texts, num_wrong: int) -> int:
    """Take drafts from the plain outputs, a seventh of `num_wrong` wrong; return the steps."""
    chance = random.Random(num_wrong)
    num_steps = 0
    while texts.unfinished:
        drafts = {}
        for slot in texts.unfinished:
            known = len(texts.outputs[slot])
            draft = plain.outputs[slot][known : known + chance.randrange(7)]
            for place in range(len(draft)):
                if chance.randrange(7) < num_wrong:
                    draft[place] = chance.randrange(END)
            drafts[slot] = [token_id for token_id in draft if token_id != END]
        texts.step(drafts)
        num_steps += 1
    return num_steps


def test_an_end_in_a_draft_is_an_end(texts: Texts, plain: Texts) -> None:
    """The scheduler offers none, but one that ignores ends may."""
    while texts.unfinished:
        texts.step(
            {
                slot: [*plain.outputs[slot][len(texts.outputs[slot]) :][:3], END, END]
                for slot in texts.unfinished
            }
        )
    assert texts.outputs == plain.outputs


def test_masks_that_are_late_shorten_a_span(plain: Texts) -> None:
    texts = Texts(mask_timeout_s=0.0)
    try:
        for _ in range(3000):
            if not texts.unfinished:
                break
            texts.step(
                {
                    slot: plain.outputs[slot][len(texts.outputs[slot]) :][:4]
                    for slot in texts.unfinished
                }
            )
        assert texts.outputs == plain.outputs
    finally:
        texts.close()


def test_a_matcher_that_fails_ahead_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    matchers = Matchers(VOCAB_SIZE, mask_timeout_s=20.0)
    matchers.start(0, COMPILER.compile('start: "ab" /[0-9]+/ "c"'), [97])
    [mask] = matchers.masks([0])
    assert mask is not None
    assert mask.num_allowed == 1
    inner = matchers._slots[0]
    ahead = matchers.look_ahead(0, [98, 49, 50])
    assert [one and one.num_allowed for one in ahead] == [10, 11, 11]
    assert matchers.look_ahead(0, [99, 49]) == [None, None]

    class Broken:
        def consume_token(self, token_id: int) -> bool:
            raise RuntimeError(token_id)

    monkeypatch.setattr(inner, "_matcher", Broken())
    assert matchers.look_ahead(0, [98, 49]) == [None, None]
    assert matchers.look_ahead(0, [98, 49]) == [None, None]
    matchers.advance([(0, [98, 49])])
    [mask] = matchers.masks([0])
    assert mask is not None
    assert mask.num_allowed == 11
    matchers.close()


def test_a_draft_leaves_the_distribution_as_it_is() -> None:
    """50,000 draws with a draft of the likeliest token: chi-square of 7 and of 7 degrees."""
    num_slots, num_steps = 250, 200
    sampler = Sampler(num_slots, 8, (), torch.device("cpu"))
    for slot in range(num_slots):
        sampler.start(SlotStart(slot, SamplingParams(max_tokens=9, seed=slot), [1]))
    logits = torch.tensor([0.3, 1.2, -0.5, 0.0, 0.9, -1.0, 0.5, 0.1])
    rows = [slot for slot in range(num_slots) for _ in range(2)]
    drafts = [[], [1]] * num_slots
    first, second = np.zeros(8), np.zeros(8)
    for step in range(num_steps):
        positions = [2 * step, 2 * step + 1] * num_slots
        output = sampler.begin(logits.repeat(2 * num_slots, 1), rows, positions, drafts).finish()
        first += np.bincount([tokens[0] for tokens in output.token_ids], minlength=8)
        second += np.bincount([t[1] for t in output.token_ids if len(t) == 2], minlength=8)
    sampler.close()
    assert first.sum() == num_slots * num_steps
    assert second.sum() == first[1]
    for counts in (first, second):
        expected = logits.softmax(0).numpy() * counts.sum()
        # 24.3: of a right sampler, one seed in a thousand exceeds it.
        assert ((counts - expected) ** 2 / expected).sum() < 24.3
