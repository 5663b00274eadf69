from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.interface import SamplingParams, SlotStart
from model.sampling.sampler import Sampler
from model.sampling.sampling_ops import ONE, rng_stream, top_tokens, uniform

CPU = torch.device("cpu")
POSITION = 5

#: Coarse, so that ties are the rule, as with logits that once were bfloat16.
coarse_logits = st.one_of(st.integers(-12, 12).map(lambda n: n / 2), st.just(-torch.inf))


@st.composite
def any_params(draw: st.DrawFn) -> SamplingParams:
    fraction = st.floats(0.001, 1.0)
    return SamplingParams(
        max_tokens=8,
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.0])),
        top_k=draw(st.one_of(st.just(0), st.integers(1, 40))),
        top_p=draw(st.one_of(st.just(1.0), fraction)),
        min_p=draw(st.one_of(st.just(0.0), fraction)),
        presence_penalty=draw(st.sampled_from([0.0, 1.5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        logit_bias=draw(st.sampled_from([(), ((0, 2.5),)])),
        allowed_token_ids=draw(st.sampled_from([None, None, (1, 0)])),
        # The output so far is one token, 1.
        bad_words=draw(st.sampled_from([(), ((0,),), ((1, 0), (0, 1))])),
        min_tokens=draw(st.sampled_from([0, 8])),
        logprobs=draw(st.sampled_from([None, 0, 4])),
        seed=draw(st.integers(0, 2**64 - 1)),
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, list[SamplingParams]]:
    vocab_size = draw(st.integers(2, 30))
    rows = draw(st.integers(1, 6))
    row = st.lists(coarse_logits, min_size=vocab_size, max_size=vocab_size).filter(
        lambda row: max(row) > -torch.inf
    )
    logits = [draw(row) for _ in range(rows)]
    return torch.tensor(logits), [draw(any_params()) for _ in range(rows)]


def started(
    batch: tuple[Tensor, list[SamplingParams]], candidates: tuple[int, ...] = (2, 5)
) -> Sampler:
    logits, params = batch
    chooser = Sampler(len(params), logits.shape[1], (1,), CPU, candidates=candidates)
    for slot, each in enumerate(params):
        chooser.start(SlotStart(slot, each, (0, 1, 0, 1), (1,)))
    return chooser


def naive_filtered_token(row: list[float], params: SamplingParams) -> int:
    """Sort everything, then walk: exact whole numbers, none of the sampler's own arithmetic."""
    peak = max(row)
    relative = (torch.tensor(row) - peak) * torch.tensor(1.0 / params.temperature)
    weight = [int(each) for each in (relative.exp().double() * ONE).tolist()]
    is_sorted = 0 < params.top_k < len(row) or params.top_p < 1.0
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))
    order = order if is_sorted else list(range(len(row)))
    kept = [token for token in order if weight[token] >= params.min_p * ONE - 0.5]
    kept = kept[: params.top_k] if params.top_k > 0 else kept
    total, mass, nucleus = sum(weight[token] for token in kept), 0, []
    for token in kept:
        if mass < params.top_p * total:
            nucleus.append(token)
        mass += weight[token]
    target = uniform(rng_stream(params.seed), POSITION) * sum(weight[token] for token in nucleus)
    for token in nucleus:
        target -= weight[token]
        if target < 0:
            return token
    return nucleus[-1]


@st.composite
def filtered_rows(draw: st.DrawFn) -> tuple[Tensor, list[SamplingParams]]:
    logits, params = draw(batches())
    return logits, [
        SamplingParams(
            max_tokens=8,
            temperature=each.temperature or 0.7,
            top_k=0 if each.top_k == 1 else each.top_k,
            top_p=each.top_p,
            min_p=each.min_p,
            seed=each.seed,
        )
        for each in params
    ]


@given(filtered_rows(), st.sampled_from([(1,), (2, 5), (4,), (64,)]))
@settings(max_examples=150)
def test_filters_agree_with_sorting_everything(
    batch: tuple[Tensor, list[SamplingParams]], candidates: tuple[int, ...]
) -> None:
    logits, params = batch
    rows = range(len(params))
    expected = [[naive_filtered_token(logits[row].tolist(), params[row])] for row in rows]
    chooser = started(batch, candidates)
    assert chooser.sample(logits.clone(), list(rows), [POSITION] * len(rows)).token_ids == expected


@given(batches(), st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_a_row_does_not_depend_on_the_others(
    batch: tuple[Tensor, list[SamplingParams]], random: object
) -> None:
    logits, params = batch
    slots = list(range(len(params)))
    positions = [POSITION] * len(params)
    together = started(batch).sample(logits.clone(), slots, positions)
    alone = started(batch)
    random.shuffle(slots)  # type: ignore[attr-defined] # hypothesis does not export its type
    for slot in slots:
        output = alone.sample(logits[slot : slot + 1].clone(), [slot], [POSITION])
        assert output.token_ids == [together.token_ids[slot]]
        if together.logprobs:
            assert (output.logprobs or [[]]) == [together.logprobs[slot]]
    alone.check()


@given(batches())
@settings(max_examples=50)
def test_the_number_of_candidates_changes_nothing(
    batch: tuple[Tensor, list[SamplingParams]],
) -> None:
    logits, params = batch
    slots = list(range(len(params)))
    positions = [POSITION] * len(params)
    few, many = started(batch, (1,)), started(batch, (64,))
    assert few.sample(logits.clone(), slots, positions) == many.sample(
        logits.clone(), slots, positions
    )
    assert many.num_widened_rows == 0


def test_a_large_vocabulary_gives_the_same_row_in_any_batch() -> None:
    """Vector lanes, threads and blocks of rows start to matter only here."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 20_011, generator=generator) * 2
    params = [
        SamplingParams(8, seed=1),
        SamplingParams(8, top_p=0.3, seed=2),
        SamplingParams(8, top_p=0.999, seed=3),
        SamplingParams(8, top_k=40, seed=4),
        SamplingParams(8, top_k=5000, top_p=0.9, seed=5),
        SamplingParams(8, min_p=0.01, seed=6),
        SamplingParams(8, min_p=0.001, top_p=0.9, seed=7),
        SamplingParams(8, temperature=0.0),
        SamplingParams(8, repetition_penalty=1.1, logprobs=3, seed=8),
    ]
    batch = (logits, params)
    slots = list(range(9))
    default = started(batch, (256, 4096))
    sorting = started(batch, ())
    for position in range(5, 9):
        positions = [position] * 9
        together = default.sample(logits.clone(), slots, positions)
        assert sorting.sample(logits.clone(), slots, positions) == together
    assert default.num_widened_rows > 0
    alone, together = started(batch), started(batch).sample(logits.clone(), slots, [5] * 9)
    for slot in slots:
        output = alone.sample(logits[slot : slot + 1].clone(), [slot], [5])
        assert output.token_ids[0] == together.token_ids[slot]
        assert (output.logprobs or [[]])[0] == together.logprobs[slot]


@given(st.lists(coarse_logits, min_size=1, max_size=40), st.integers(1, 45))
def test_top_tokens_come_in_the_order_of_a_stable_sort(row: list[float], count: int) -> None:
    found = top_tokens(torch.tensor([row]), count)
    num_sure = int(found.num_sure[0])
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))
    assert found.values[0].tolist() == [row[token] for token in order[:count]]
    assert found.ids[0, :num_sure].tolist() == order[:num_sure]
    assert num_sure == len(row) if count >= len(row) else num_sure < count


def test_one_value_has_one_weight_wherever_it_stands() -> None:
    """Candidates equal a full sort only if exp does not depend on the vector lane."""
    for size in (*range(1, 70), 4099):
        weights = torch.full((3, size), -size / 7).exp()
        assert bool((weights == weights[0, 0]).all())
