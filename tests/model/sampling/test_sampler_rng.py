from __future__ import annotations

import pytest
import torch

from model.interface import SamplingParams, SlotStart
from model.sampling.sampler import Sampler
from model.sampling.sampling_ops import rng_stream, uniform

CPU = torch.device("cpu")
LOGITS = (2.0, 1.5, 1.5, 0.7, 0.0, -0.3, -1.0, -torch.inf)
NUM_DRAWS = 20_000

#: Chi-square, 0.999 quantile, by degrees of freedom.
CRITICAL = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 99: 148.23}


def chi_square(observed: list[int], probabilities: list[float]) -> float:
    total = sum(observed)
    return sum(
        (seen - total * p) ** 2 / (total * p)
        for seen, p in zip(observed, probabilities, strict=True)
        if p > 0
    )


def distribution(params: SamplingParams) -> list[float]:
    """Apply the parameters in float64, by their textbook definitions."""
    p = (torch.tensor(LOGITS, dtype=torch.float64) / params.temperature).softmax(-1)
    p[p < params.min_p * p.max()] = 0
    order = p.sort(descending=True, stable=True).indices
    if params.top_k > 0:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    before = p[order].cumsum(-1) - p[order]
    p[order[before >= params.top_p]] = 0
    found: list[float] = (p / p.sum()).tolist()
    return found


CASES = pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_k": 2, "temperature": 1.7},
        {"top_p": 0.75},
        {"min_p": 0.2},
        {"min_p": 0.3, "top_p": 0.7},
        {"top_k": 5, "top_p": 0.8, "min_p": 0.1, "temperature": 1.2},
    ],
    ids=str,
)


@CASES
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_draws_follow_the_distribution(params: dict[str, float], vary: str) -> None:
    seeds = range(NUM_DRAWS) if vary == "seed" else [123]
    chooser = Sampler(len(seeds), len(LOGITS), (), CPU)
    for slot, seed in enumerate(seeds):
        chooser.start(SlotStart(slot, SamplingParams(9, seed=seed, **params), ()))  # type: ignore[arg-type] # a mix of ints and floats
    slots = list(range(NUM_DRAWS)) if vary == "seed" else [0] * NUM_DRAWS
    positions = [7] * NUM_DRAWS if vary == "seed" else list(range(NUM_DRAWS))
    logits = torch.tensor(LOGITS).repeat(NUM_DRAWS, 1)
    tokens = chooser.sample(logits, slots, positions).token_ids
    observed = torch.bincount(torch.tensor(tokens).flatten(), minlength=len(LOGITS)).tolist()
    expected = distribution(SamplingParams(9, **params))  # type: ignore[arg-type] # as above
    possible = sum(p > 0 for p in expected)
    assert all(seen == 0 for seen, p in zip(observed, expected, strict=True) if p == 0)
    assert chi_square(observed, expected) < CRITICAL[possible - 1]


def test_the_generator_is_splitmix64() -> None:
    # The published first outputs for the state 1234567.
    outputs = (6457827717110365317, 3203168211198807973, 9817491932198370423)
    assert [uniform(1234567, i) for i in range(3)] == [(o >> 11) * 2.0**-53 for o in outputs]


@pytest.mark.parametrize("seed_step", [1, 2**32, 0x9E3779B97F4A7C15], ids=hex)
@pytest.mark.parametrize("position_step", [0, 1, -1])
def test_neighbouring_seeds_and_positions_are_independent(
    seed_step: int, position_step: int
) -> None:
    cells = [0] * 100
    for seed in range(100):
        for position in range(1, 101):
            one = uniform(rng_stream(seed), position)
            other = uniform(rng_stream((seed + seed_step) % 2**64), position + position_step)
            cells[int(one * 10) * 10 + int(other * 10)] += 1
    assert chi_square(cells, [0.01] * 100) < CRITICAL[99]


def test_uniform_stays_below_one() -> None:
    values = [uniform(rng_stream(seed), seed) for seed in (0, 1, 2**63, 2**64 - 1)]
    assert all(0.0 <= value < 1.0 for value in values)
    assert len(set(values)) == 4


def test_the_seed_decides() -> None:
    logits = torch.zeros(1, 1000)
    tokens = []
    for seed in (1, 1, 2):
        chooser = Sampler(1, 1000, (), CPU)
        chooser.start(SlotStart(0, SamplingParams(9, seed=seed), ()))
        tokens.append([chooser.sample(logits.clone(), [0], [i]).token_ids[0][0] for i in range(9)])
    assert tokens[0] == tokens[1] != tokens[2]
    assert len(set(tokens[0])) > 5
