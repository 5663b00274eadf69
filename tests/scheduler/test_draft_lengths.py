"""Drafts are as long as they pay: by measured prices and by the acceptance so far."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_drafter import ScriptedDrafter

from model.fake import fake_output
from scheduler.acceptance import TRIAL_STEPS, Acceptance
from scheduler.draft_lengths import Offer, Step, choose_lengths
from scheduler.pacing import Pacing

DECODE_S = 10.0


def rate(offers: list[Offer], lengths: tuple[int, ...], step: Step) -> float:
    gains = (o.acceptance**j for o, n in zip(offers, lengths, strict=True) for j in range(1, n + 1))
    return (step.num_tokens + sum(gains)) / (step.time_s + step.draft_token_s * sum(lengths))


@given(
    offers=st.lists(
        st.builds(Offer, st.integers(1, 3), st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0])), max_size=4
    ),
    budget=st.integers(0, 8),
    num_tokens=st.integers(1, 4),
    draft_token_s=st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0, 10.0]),
)
def test_no_other_lengths_give_more_tokens_a_second(
    offers: list[Offer], budget: int, num_tokens: int, draft_token_s: float
) -> None:
    step = Step(num_tokens, DECODE_S, draft_token_s)
    lengths, extended = choose_lengths(offers, budget, step)
    choices = product(*(range(offer.num_tokens + 1) for offer in offers))
    best = max(rate(offers, choice, step) for choice in choices if sum(choice) <= budget)
    assert sum(lengths) <= budget
    assert rate(offers, tuple(lengths), step) == pytest.approx(best)
    assert extended.num_tokens / extended.time_s == pytest.approx(best)


def simulate(
    make_drive: Callable[..., Any],
    token_s: float,
    is_right: Callable[[int], bool],
    *,
    num_tokens: int = 200,
    num_requests: int = 1,
    probability: float = 0.8,
    slow_steps: tuple[int, ...] = (),
) -> tuple[Any, float]:
    """Run requests with a clock: 10 s a step of decodes, and `token_s` a further token of drafts.

    A draft's token at position p is right if `is_right(p)`. Return also the time of all decodes.
    """

    def guess(token_ids: list[int], max_tokens: int) -> list[int]:
        right = fake_output(token_ids, max_tokens)
        return [one if is_right(p) else 63 for p, one in enumerate(right, len(token_ids))]

    drive = make_drive(
        drafter=ScriptedDrafter(guess, probability),
        num_pages=400,
        max_model_len=600,
        max_num_seqs=16,
        max_num_batched_tokens=64,
    )
    for request_id in range(num_requests):
        drive.submit(request_id, (request_id + 1,), max_tokens=num_tokens)
    total_s = 0.0
    while drive.scheduler.has_work:
        plan = drive.scheduler.plan()
        prompts_s = 0.1 * plan.num_prompt_tokens
        decodes_s = DECODE_S + 0.1 * plan.num_decodes if plan.num_decodes else 0.0
        elapsed_s = decodes_s + token_s * plan.num_draft_tokens
        elapsed_s += 100 * DECODE_S if len(drive.plans) in slow_steps else 0.0
        drive.plans.append(plan)
        drive.apply(plan, elapsed_s + prompts_s)
        total_s += elapsed_s
    for request_id in range(num_requests):
        assert drive.outputs[request_id] == drive.expected((request_id + 1,), num_tokens)
    return drive, total_s


def num_drafted(drive: Any) -> int:
    return sum(bool(plan.num_draft_tokens) for plan in drive.plans)


def test_right_and_cheap_drafts_are_long(make_drive: Callable[..., Any]) -> None:
    _, total_s = simulate(make_drive, 0.2, lambda _: True)
    assert total_s < 0.15 * 200 * DECODE_S


def test_wrong_drafts_are_one_of_sixteen_steps(make_drive: Callable[..., Any]) -> None:
    drive, total_s = simulate(make_drive, 1.0, lambda _: False, num_tokens=400)
    assert 400 / TRIAL_STEPS - 4 <= num_drafted(drive) <= 400 / TRIAL_STEPS + 8
    assert total_s < 1.03 * 400 * (DECODE_S + 0.1)


def test_tokens_that_cost_a_step_are_hardly_tried(make_drive: Callable[..., Any]) -> None:
    """Twice for their price: it is not known at first, and then measured again."""
    drive, total_s = simulate(make_drive, 11.0, lambda _: True, num_tokens=400)
    assert num_drafted(drive) == 2
    assert total_s < 1.01 * 400 * (DECODE_S + 0.1)


def test_a_price_that_one_slow_step_had_is_corrected(make_drive: Callable[..., Any]) -> None:
    drive, _ = simulate(make_drive, 0.5, lambda _: True, num_tokens=500, slow_steps=(2,))
    assert drive.plans[2].num_draft_tokens
    assert sum(plan.num_draft_tokens for plan in drive.plans[3:256]) == 0
    late = drive.plans[265:-2]
    assert sum(plan.num_draft_tokens for plan in late) > 10 * len(late) > 0


@pytest.mark.parametrize("num_requests", [1, 8])
@pytest.mark.parametrize("token_s", [0.3, 2.0, 8.0])
@pytest.mark.parametrize("period", [2, 3, 5])
def test_no_run_is_slower(
    make_drive: Callable[..., Any], period: int, token_s: float, num_requests: int
) -> None:
    _, total_s = simulate(
        make_drive, token_s, lambda p: p % period != 0, num_requests=num_requests, num_tokens=150
    )
    assert total_s < 1.04 * 150 * (DECODE_S + 0.1 * num_requests)


def test_a_text_that_begins_to_repeat_is_noticed(make_drive: Callable[..., Any]) -> None:
    drive, _ = simulate(make_drive, 0.5, lambda position: position > 150, num_tokens=400)
    late = [plan for plan in drive.plans if plan.step.positions[0] > 220]
    assert sum(plan.num_draft_tokens for plan in late) / len(late) > 8


def test_an_estimate_starts_with_the_drafters_own() -> None:
    acceptance = Acceptance()
    assert acceptance.of(0.7) == 0.7
    assert acceptance.is_trial_due
    for _ in range(40):
        acceptance.observe(2, 1, 0.5)
    # One of two was accepted, as foreseen.
    assert acceptance.of(0.5) == pytest.approx(0.5)
    for _ in range(40):
        acceptance.observe(1, 0, 0.5)
    assert acceptance.of(1.0) < 0.01
    is_due = []
    for _ in range(TRIAL_STEPS + 1):
        is_due.append(acceptance.is_trial_due)
        acceptance.wait()
    assert is_due == [False] * (TRIAL_STEPS - 1) + [True] * 2


def estimated(pacing: Pacing, num_decodes: int) -> tuple[float, ...]:
    step = pacing.step(num_decodes, pacing.text_price)
    assert step is not None
    return tuple(step)


def test_prices_of_drafts() -> None:
    pacing = Pacing(3.0)
    assert pacing.step(1, pacing.text_price) is None
    has_to_time_decodes = [pacing.has_to_time_decodes]
    pacing.observe(1.0, num_decodes=0, num_prompt_tokens=10)
    # Prompts alone were timed: decodes come first.
    has_to_time_decodes.append(pacing.has_to_time_decodes)
    assert has_to_time_decodes == [False, True]
    pacing.observe(5.0, num_decodes=1, num_prompt_tokens=0, num_draft_tokens=4)
    assert pacing.step(1, pacing.text_price) is None
    pacing.observe(10.0, num_decodes=1, num_prompt_tokens=0)
    assert estimated(pacing, 1) == pytest.approx((1, 10.0, 10.0 / 8))
    assert estimated(pacing, 2) == pytest.approx((2, 10.1, 10.1 / 16))
    assert pacing.step(0, pacing.text_price) is None
    pacing.observe(12.0, num_decodes=1, num_prompt_tokens=0, num_draft_tokens=4)
    assert estimated(pacing, 1) == pytest.approx((1, 10.0, 0.5))
    for _ in range(20):
        pacing.observe(9.0, num_decodes=1, num_prompt_tokens=0, num_draft_tokens=4)
    assert pacing.text_price.token_s == 0.0
    pacing.check()


def test_steps_with_drafts_are_interrupted_by_one_without() -> None:
    pacing = Pacing(3.0)
    pacing.observe(10.0, num_decodes=1, num_prompt_tokens=0)
    num_steps = 0
    while not pacing.has_to_time_decodes:
        pacing.observe(10.0, num_decodes=1, num_prompt_tokens=0, num_draft_tokens=1)
        num_steps += 1
    assert num_steps == 64
    pacing.observe(10.0, num_decodes=1, num_prompt_tokens=0)
    assert not pacing.has_to_time_decodes
