"""Tokens that are never sampled: outside `allowed_token_ids`, and the ends of `bad_words`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.interface import SamplingParams, SlotStart
from model.sampling.bad_words import BannedSequences
from model.sampling.sampler import Sampler

CPU = torch.device("cpu")
VOCAB = 6
EOS = 5
PROMPT = (1, 2)

words = st.lists(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3).map(tuple), max_size=4
).map(tuple)


def logits_at(position: int) -> Tensor:
    return torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(position)) * 2


def generate(
    chooser: Sampler,
    params: SamplingParams,
    num_tokens: int,
    output: tuple[int, ...] = (),
    slot: int = 0,
) -> list[int]:
    chooser.start(SlotStart(slot, params, PROMPT, output))
    tokens = list(output)
    while len(tokens) < num_tokens:
        position = len(PROMPT) + len(tokens)
        tokens += chooser.sample(logits_at(position), [slot], [position]).token_ids[0]
        chooser.check()
    return tokens


def contains(tokens: list[int], word: tuple[int, ...]) -> bool:
    return any(tuple(tokens[i : i + len(word)]) == word for i in range(len(tokens)))


@given(sequences=words.filter(bool), output=st.lists(st.integers(0, VOCAB - 1), max_size=12))
def test_banned_is_what_would_complete_a_sequence(
    sequences: tuple[tuple[int, ...], ...], output: list[int]
) -> None:
    expected = {word[-1] for word in sequences if [*output, word[-1]][-len(word) :] == list(word)}
    assert BannedSequences(sequences, output).next_banned() == expected
    follows = BannedSequences(sequences, ())
    for token in output:
        follows.push([token])
    assert follows.next_banned() == expected


@settings(max_examples=60)
@given(
    bad=words,
    temperature=st.sampled_from([0.0, 1.5]),
    top_p=st.sampled_from([1.0, 0.7]),
    allowed=st.sampled_from([None, (3, 1, 4)]),
    num_resumed=st.integers(0, 9),
)
def test_no_output_has_a_bad_word_or_a_token_that_is_not_allowed(
    bad: tuple[tuple[int, ...], ...],
    temperature: float,
    top_p: float,
    allowed: tuple[int, ...] | None,
    num_resumed: int,
) -> None:
    params = SamplingParams(
        20, temperature=temperature, top_p=top_p, bad_words=bad, allowed_token_ids=allowed, seed=5
    )
    tokens = generate(Sampler(1, VOCAB, (EOS,), CPU, candidates=(2,)), params, 20)
    possible = set(range(VOCAB) if allowed is None else allowed)
    assert set(tokens) <= set(range(VOCAB) if allowed is None else allowed)
    if not possible <= {word[-1] for word in bad}:
        assert not any(contains(tokens, word) for word in bad)
    again = Sampler(1, VOCAB, (EOS,), CPU, candidates=(2,))
    assert generate(again, params, 20, tuple(tokens[:num_resumed])) == tokens, "resumed"


def test_each_row_of_a_batch_has_its_own_bans() -> None:
    asked = [
        SamplingParams(9, temperature=0.0),
        SamplingParams(9, temperature=0.0, allowed_token_ids=(2,)),
        SamplingParams(9, temperature=0.0, bad_words=((3,), (4, 0))),
        SamplingParams(9, seed=1),
        SamplingParams(9, seed=1, allowed_token_ids=(0, 4), bad_words=((0,),)),
    ]
    chooser = Sampler(len(asked), VOCAB, (EOS,), CPU)
    for slot, params in enumerate(asked):
        chooser.start(SlotStart(slot, params, PROMPT))
    row = torch.tensor([0.0, 1.0, 2.0, 9.0, 8.0, 3.0])
    together = chooser.sample(row.repeat(5, 1), [0, 1, 2, 3, 4], [2] * 5).token_ids
    assert together[:3] == [[3], [2], [4]]
    assert together[4] == [4]
    assert chooser.sample(row.repeat(2, 1), [2, 1], [3, 3]).token_ids == [[4], [2]]
    alone = Sampler(1, VOCAB, (EOS,), CPU)
    alone.start(SlotStart(0, asked[3], PROMPT))
    assert alone.sample(row.repeat(1, 1), [0], [2]).token_ids == [together[3]]


def test_a_slot_forgets_the_bans_of_the_sequence_before() -> None:
    chooser = Sampler(1, VOCAB, (EOS,), CPU)
    free = SamplingParams(4, temperature=0.0)
    bound = SamplingParams(4, temperature=0.0, allowed_token_ids=(0,), bad_words=((1,),))
    expected = generate(Sampler(1, VOCAB, (EOS,), CPU), free, 4)
    assert generate(chooser, bound, 4) == [0] * 4
    assert generate(chooser, free, 4) == expected != [0] * 4


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(3, bad_words=((2,), (4,)), allowed_token_ids=(2, 4)),
        SamplingParams(3, temperature=0.0, bad_words=((2, 2),), allowed_token_ids=(2,)),
        SamplingParams(3, temperature=0.0, allowed_token_ids=(EOS,), min_tokens=3),
    ],
    ids=["all bad", "bad after the first", "only the end, and too early"],
)
def test_bans_give_way_where_they_would_leave_nothing(params: SamplingParams) -> None:
    assert params.allowed_token_ids is not None
    tokens = generate(Sampler(1, VOCAB, (EOS,), CPU), params, 3)
    assert set(tokens) <= set(params.allowed_token_ids)


def test_logprobs_are_of_the_raw_logits_all_the_same() -> None:
    params = SamplingParams(9, temperature=0.0, allowed_token_ids=(0,), logprobs=1)
    chooser = Sampler(1, VOCAB, (EOS,), CPU)
    chooser.start(SlotStart(0, params, PROMPT))
    ((found,),) = chooser.sample(logits_at(2), [0], [2]).logprobs
    raw = logits_at(2)[0].log_softmax(-1)
    assert found.logprob == pytest.approx(raw[0].item(), abs=1e-6)
    assert found.top[0][0] == int(raw.argmax()) != 0


def test_sequences_of_tokens_that_do_not_exist_ban_nothing() -> None:
    chooser = Sampler(1, VOCAB, (EOS,), CPU)
    plain = generate(chooser, SamplingParams(9, temperature=0.0), 9)
    bad = ((VOCAB,), (1, VOCAB))
    assert generate(chooser, SamplingParams(9, temperature=0.0, bad_words=bad), 9) == plain


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"allowed_token_ids": ()}, "allowed_token_ids"),
        ({"bad_words": ((),)}, "bad_words"),
    ],
)
def test_parameters_that_ask_for_nothing_are_refused(params: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        SamplingParams(9, **params)  # type: ignore[arg-type] # wrong ones, on purpose


def test_an_allowed_token_must_exist() -> None:
    with pytest.raises(ValueError, match=f"allowed_token_ids names token {VOCAB}"):
        Sampler(1, VOCAB, (EOS,), CPU).start(
            SlotStart(0, SamplingParams(9, allowed_token_ids=(VOCAB,)), PROMPT)
        )
