from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from model.interface import SamplingParams, SlotStart
from model.sampling.sampler import Sampler
from model.sampling.sampling_ops import Filters, draw_plain

CPU = torch.device("cpu")
VOCAB = 12
EOS = 3
PROMPT = (1, 2, 2, 5)


def sampler(candidates: tuple[int, ...] = (2,)) -> Sampler:
    return Sampler(8, VOCAB, (EOS,), CPU, candidates=candidates)


def some_logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def generate(
    chooser: Sampler,
    params: SamplingParams,
    num_tokens: int,
    output: tuple[int, ...] = (),
    slot: int = 0,
    prompt: tuple[int, ...] = PROMPT,
) -> list[int]:
    """Generate from logits which depend on the position alone."""
    chooser.start(SlotStart(slot, params, prompt, output))
    tokens = list(output)
    while len(tokens) < num_tokens:
        position = len(prompt) + len(tokens)
        step = chooser.sample(some_logits(1, seed=position), [slot], [position])
        tokens += step.token_ids[0]
        chooser.check()
    return tokens


def naive_penalties(
    row: list[float], params: SamplingParams, prompt: tuple[int, ...], output: tuple[int, ...]
) -> list[float]:
    found = []
    for token, logit in enumerate(row):
        value = logit
        if token in prompt or token in output:
            rate = params.repetition_penalty
            value = value / rate if value > 0 else value * rate
        value -= output.count(token) * params.frequency_penalty
        value -= (token in output) * params.presence_penalty
        found.append(value)
    return found


def test_greedy_takes_the_likeliest_and_of_equals_the_lowest_id() -> None:
    chooser = sampler()
    logits = some_logits(3)
    logits[1, [4, 7, 9]] = 50.0
    expected = [int(logits[0].argmax()), 4, int(logits[2].argmax())]
    for slot, params in enumerate(
        (
            SamplingParams(9, temperature=0.0),
            SamplingParams(9, temperature=0.0),
            SamplingParams(9, temperature=1.3, top_k=1),
        )
    ):
        chooser.start(SlotStart(slot, params, PROMPT))
    output = chooser.sample(logits, [0, 1, 2], [4, 4, 4])
    assert output.token_ids == [[token_id] for token_id in expected]
    assert output.logprobs == []


@pytest.mark.parametrize(("u", "token"), [(0.0, 1), (1.0 - 2.0**-53, 3)])
def test_a_draw_at_either_end_takes_a_possible_token(u: float, token: int) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -10.0, -torch.inf]])
    filters = Filters(torch.ones(1, 1), None, None, torch.full((1, 1), torch.inf))
    found, peak = draw_plain(logits, filters, torch.tensor([[u]], dtype=torch.float64))
    assert found.tolist() == [token]
    assert peak.tolist() == [1.0]


def test_no_rows_give_no_tokens() -> None:
    assert sampler().sample(torch.zeros(0, VOCAB), [], []).token_ids == []


def test_a_tiny_temperature_is_greedy() -> None:
    chooser = sampler()
    logits = some_logits(1)
    chooser.start(SlotStart(0, SamplingParams(9, temperature=1e-300), PROMPT))
    assert chooser.sample(logits.clone(), [0], [4]).token_ids == [[int(logits.argmax())]]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(9, temperature=0.0, repetition_penalty=1.7),
        SamplingParams(9, temperature=0.0, repetition_penalty=0.4),
        SamplingParams(9, temperature=0.0, presence_penalty=1.5),
        SamplingParams(9, temperature=0.0, frequency_penalty=-0.9),
        SamplingParams(
            9,
            temperature=0.0,
            repetition_penalty=1.2,
            presence_penalty=-0.5,
            frequency_penalty=0.8,
        ),
    ],
    ids=["repetition", "reward", "presence", "frequency", "all"],
)
def test_penalties_follow_their_formulas(params: SamplingParams) -> None:
    chooser = sampler()
    chooser.start(SlotStart(0, params, PROMPT, (7, 7, 1)))
    chooser.start(SlotStart(1, SamplingParams(9, temperature=0.0), PROMPT))
    output: tuple[int, ...] = (7, 7, 1)
    for step in range(12):
        logits = some_logits(2, seed=step)
        penalized = naive_penalties(logits[0].tolist(), params, PROMPT, output)
        expected = [[penalized.index(max(penalized))], [int(logits[1].argmax())]]
        assert chooser.sample(logits, [0, 1], [7 + step, 4 + step]).token_ids == expected
        output += (*expected[0],)
        chooser.check()


def test_penalties_keep_rows_only_for_slots_that_use_them() -> None:
    chooser = sampler()
    plain = SamplingParams(9, temperature=0.0)
    penalized = SamplingParams(9, temperature=0.0, presence_penalty=1.0)
    chooser.start(SlotStart(0, plain, PROMPT))
    counts = chooser._counts
    assert len(counts.generated) == 0
    for slot in (1, 2, 4):
        chooser.start(SlotStart(slot, penalized, PROMPT))
        chooser.check()
    assert len(counts.row_of_slot) == 3
    num_rows = len(counts.generated)
    assert num_rows >= 3
    chooser.start(SlotStart(2, plain, PROMPT))
    chooser.start(SlotStart(5, penalized, PROMPT))
    chooser.check()
    assert len(counts.row_of_slot) == 3
    assert len(counts.generated) == num_rows


def test_a_slot_forgets_the_sequence_before() -> None:
    params = SamplingParams(9, temperature=0.9, repetition_penalty=1.5, presence_penalty=2.0)
    fresh, used = sampler(), sampler()
    generate(used, SamplingParams(9, frequency_penalty=2.0, seed=5), 6, prompt=(0, 4, 6, 8, 9, 10))
    for seed in range(5):
        params = dataclasses.replace(params, seed=seed)
        assert generate(used, params, 9) == generate(fresh, params, 9)


@pytest.mark.parametrize("num_before", [0, 1, 5, 11])
def test_preempted_and_resumed_gives_the_same_tokens(num_before: int) -> None:
    params = SamplingParams(
        12,
        temperature=1.4,
        top_p=0.95,
        repetition_penalty=1.3,
        presence_penalty=0.7,
        frequency_penalty=0.4,
        min_tokens=6,
        logit_bias=((4, 1.5),),
        seed=77,
    )
    first = sampler()
    whole = generate(first, params, 12)
    assert len(set(whole)) > 3
    assert first.num_widened_rows > 0
    chooser = sampler()
    generate(chooser, params, num_before, slot=2)
    generate(chooser, SamplingParams(12, frequency_penalty=2.0), 4, slot=2)
    assert generate(chooser, params, 12, tuple(whole[:num_before]), slot=6) == whole


def test_a_bias_is_added_to_its_token() -> None:
    chooser = sampler()
    params = SamplingParams(9, temperature=0.0, logit_bias=((6, 100.0), (2, -100.0)))
    chooser.start(SlotStart(0, params, PROMPT))
    chooser.start(SlotStart(1, SamplingParams(9, temperature=0.0), PROMPT))
    logits = some_logits(2)
    logits[:, 2] = 90.0
    assert chooser.sample(logits, [0, 1], [4, 4]).token_ids == [[6], [2]]


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_bias_outside_the_vocabulary_is_refused_by_name(token: int) -> None:
    with pytest.raises(ValueError, match=f"^logit_bias names token {token}"):
        sampler().start(SlotStart(0, SamplingParams(9, logit_bias=((token, 1.0),)), PROMPT))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_bans_ends_until_then(temperature: float) -> None:
    chooser = sampler()
    params = SamplingParams(9, temperature=temperature, min_tokens=3, stop_token_ids=(8, VOCAB + 5))
    chooser.start(SlotStart(0, params, PROMPT))
    chooser.start(SlotStart(1, SamplingParams(9, temperature=temperature), PROMPT))
    for num_output in range(5):
        logits = torch.zeros(2, VOCAB)
        logits[:, EOS], logits[:, 8], logits[:, 1] = 90.0, 60.0, 30.0
        tokens = chooser.sample(logits, [0, 1], [len(PROMPT) + num_output] * 2).token_ids
        assert tokens == [[1 if num_output < 3 else EOS], [EOS]]


def test_ignore_eos_does_not_ban_it() -> None:
    chooser = sampler()
    chooser.start(SlotStart(0, SamplingParams(9, temperature=0.0, ignore_eos=True), PROMPT))
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS] = 5.0
    assert chooser.sample(logits, [0], [4]).token_ids == [[EOS]]


@pytest.mark.parametrize(
    ("value", "where"),
    # One token that cannot be is not a fault.
    [
        (math.nan, slice(None)),
        (math.nan, slice(3, 4)),
        (math.inf, slice(None)),
        (math.inf, slice(3, 4)),
        (-math.inf, slice(None)),
    ],
    ids=["all nan", "one nan", "all inf", "one inf", "all -inf"],
)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(9, temperature=0.0),
        SamplingParams(9),
        SamplingParams(9, top_p=0.5, logprobs=2),
        SamplingParams(9, top_k=3, presence_penalty=1.0),
    ],
    ids=["greedy", "plain", "top_p", "top_k"],
)
def test_a_row_that_is_not_finite_gets_no_token_and_harms_no_other(
    params: SamplingParams, value: float, where: slice
) -> None:
    logits = some_logits(3)
    tokens = []
    for is_broken in (False, True):
        chooser = sampler()
        for slot in range(3):
            chooser.start(SlotStart(slot, params, PROMPT))
        rows = logits.clone()
        if is_broken:
            rows[1, where] = value
        output = chooser.sample(rows, [0, 1, 2], [4, 4, 4])
        tokens.append(output.token_ids)
        is_none_left = is_broken and value == -math.inf
        assert output.not_finite == [1] * (is_broken and not is_none_left)
        assert list(output.failures) == [1] * is_none_left
        for [entry] in output.logprobs[:1] + output.logprobs[2:]:
            assert all(math.isfinite(logprob) for _, logprob in (entry.top or ((0, 0.0),)))
            assert math.isfinite(entry.logprob)
        chooser.check()
    sound, broken = tokens
    assert (broken[0], broken[2]) == (sound[0], sound[2])
    assert broken[1] == []


def test_it_counts_widened_rows() -> None:
    chooser = sampler()
    generate(chooser, SamplingParams(9), 5)
    assert chooser.num_widened_rows == 0
    generate(chooser, SamplingParams(9, top_p=0.999), 4)
    assert 1 <= chooser.num_widened_rows <= 4


def test_check_sees_a_lost_row() -> None:
    chooser = sampler()
    chooser.start(SlotStart(0, SamplingParams(9, presence_penalty=1.0), PROMPT))
    chooser._counts.row_of_slot.clear()
    with pytest.raises(AssertionError, match="of 1 rows"):
        chooser.check()
