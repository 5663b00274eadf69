from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.interface import SamplingParams, SlotStart, TokenLogprobs
from model.sampling.sampler import Sampler

CPU = torch.device("cpu")
VOCAB = 50


def some_logits(rows: int) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0)) * 4


def sampled(logits: Tensor, *params: SamplingParams) -> tuple[list[int], list[list[TokenLogprobs]]]:
    chooser = Sampler(len(params), logits.shape[1], (), CPU)
    for slot, each in enumerate(params):
        chooser.start(SlotStart(slot, each, (1, 2)))
    rows = len(params)
    output = chooser.sample(logits.clone(), list(range(rows)), [2] * rows)
    return [token_id for [token_id] in output.token_ids], output.logprobs


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(9, temperature=0.0, logprobs=5),
        SamplingParams(9, temperature=1.9, logprobs=20, seed=3),
        SamplingParams(
            9,
            temperature=2.0,
            top_k=30,
            repetition_penalty=2.0,
            logit_bias=((7, 90.0),),
            logprobs=4,
        ),
    ],
    ids=["greedy", "hot", "edited"],
)
def test_they_are_of_the_raw_logits(params: SamplingParams) -> None:
    logits = some_logits(1)
    (token,), ((found,),) = sampled(logits, params)
    assert params.logprobs is not None
    raw = logits[0].double().log_softmax(-1)
    order = raw.argsort(descending=True).tolist()
    assert found.token_id == token
    assert found.logprob == pytest.approx(raw[token].item(), abs=1e-6)
    assert found.rank == order.index(token) + 1
    assert [top for top, _ in found.top] == order[: params.logprobs]
    assert [logprob for _, logprob in found.top] == pytest.approx(
        raw[order[: params.logprobs]].tolist(), abs=1e-6
    )


def test_only_rows_that_ask_get_them() -> None:
    plain = SamplingParams(9, temperature=0.0)
    _, found = sampled(
        some_logits(4),
        plain,
        SamplingParams(9, temperature=0.0, logprobs=0),
        plain,
        SamplingParams(9, temperature=0.0, logprobs=2),
    )
    assert [[len(one.top) for one in each] for each in found] == [[], [0], [], [2]]


@pytest.mark.parametrize("num_equal", [3, 30, VOCAB])
def test_equals_stand_in_the_order_of_their_ids(num_equal: int) -> None:
    logits = torch.full((1, VOCAB), -1.0)
    logits[0, VOCAB - num_equal :] = 2.0
    first = VOCAB - num_equal
    for seed in range(6):
        (token,), ((found,),) = sampled(logits, SamplingParams(9, top_k=3, seed=seed, logprobs=3))
        assert [top for top, _ in found.top] == [first, first + 1, first + 2]
        assert found.rank == token - first + 1


def test_a_small_vocabulary_has_no_more_than_it_has() -> None:
    _, ((found,),) = sampled(torch.zeros(1, 3), SamplingParams(9, temperature=0.0, logprobs=20))
    assert [top for top, _ in found.top] == [0, 1, 2]


def test_an_impossible_token_has_a_finite_logprob() -> None:
    logits = torch.tensor([[0.0, -torch.inf]])
    params = SamplingParams(9, temperature=0.0, logprobs=2)
    _, ((found,),) = sampled(logits, params)
    assert found == TokenLogprobs(0, 0.0, 1, ((0, 0.0), (1, -9999.0)))
