"""Drafts of a draft model: as those of texts, and with a price of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from scripted_drafter import ScriptedDrafter

from model.fake import fake_output
from scheduler.acceptance import TRIAL_STEPS
from scheduler.messages import FinishReason
from scheduler.pacing import Pacing

MakeDrive = Callable[..., Any]
PROMPTS = {0: (1, 2, 3), 1: (1, 2, 3, 4, 5, 6, 7, 8, 9), 2: (9, 9)}
DECODE_S = 10.0


@pytest.mark.parametrize("num_pages", [9, 64])
@pytest.mark.parametrize("has_texts", [True, False])
@pytest.mark.parametrize("guess_period", [1, 3, 1000])
def test_guesses_change_no_token(
    make_drive: MakeDrive, guess_period: int, has_texts: bool, num_pages: int
) -> None:
    drafter = ScriptedDrafter(lambda *_: []) if has_texts else None
    drive = make_drive(
        drafter=drafter, guess_period=guess_period, max_num_seqs=4, num_pages=num_pages
    )
    for request_id, prompt in PROMPTS.items():
        drive.submit(request_id, prompt, max_tokens=9 + request_id)
    drive.run()
    assert drive.outputs == {n: drive.expected(prompt, 9 + n) for n, prompt in PROMPTS.items()}
    assert drive.finished == dict.fromkeys(PROMPTS, FinishReason.LENGTH)
    assert any(plan.num_guessed_tokens for plan in drive.plans)
    assert (drive.scheduler.stats().preemptions_total > 0) == (num_pages == 9)


def test_right_guesses_save_steps(make_drive: MakeDrive) -> None:
    drive = make_drive(guess_period=1000, speculative_tokens=3)
    drive.submit(0, PROMPTS[0], max_tokens=20)
    drive.run()
    assert drive.outputs[0] == drive.expected(PROMPTS[0], 20)
    assert [plan.num_guessed_tokens for plan in drive.plans] == [0, 3, 3, 3, 3, 2]
    [counts] = drive.scheduler.stats().speculation.drafters
    assert counts == ("model", 14, 14)


def test_the_first_wrong_guess_ends_a_draft(make_drive: MakeDrive) -> None:
    drive = make_drive(guess_period=7, speculative_tokens=5)
    drive.submit(0, PROMPTS[0], max_tokens=20)
    drive.step()
    drive.step()
    # Positions 4 to 8 are drafted, of which 7 is wrong.
    assert drive.drafts == [(0, 5, 3)]
    assert drive.outputs[0] == drive.expected(PROMPTS[0], 5)


def test_a_text_comes_before_the_model(make_drive: MakeDrive) -> None:
    """Of two sequences one has a draft of a text; with it the step is timed for the other."""

    def guess(token_ids: list[int], max_tokens: int) -> list[int]:
        return fake_output(token_ids, min(2, max_tokens)) if token_ids[0] == 9 else []

    drive = make_drive(drafter=ScriptedDrafter(guess), guess_period=1000, speculative_tokens=4)
    drive.submit(0, PROMPTS[0], max_tokens=30)
    drive.submit(1, PROMPTS[2], max_tokens=30)
    for _ in range(2):
        drive.step(DECODE_S)
    drive.scheduler.pacing.observe(DECODE_S, num_decodes=2, num_prompt_tokens=0)
    names = set()
    while drive.scheduler.has_work:
        plan = drive.step(DECODE_S)
        names |= {
            (row, draft.drafter) for row, draft in plan.drafts.items() if len(plan.sequences) == 2
        }
    assert names == {(0, "model"), (1, "scripted")}
    assert drive.outputs == {0: drive.expected(PROMPTS[0], 30), 1: drive.expected(PROMPTS[2], 30)}


def test_a_request_may_go_without(make_drive: MakeDrive) -> None:
    drive = make_drive(guess_period=1000)
    drive.submit(0, PROMPTS[0], may_speculate=False)
    drive.run()
    assert drive.drafts == []
    assert not drive.scheduler.awaits_tokens


def test_a_span_that_ends_early_counts_as_far_as_it_was_drawn(make_drive: MakeDrive) -> None:
    """The mask behind the second guess was late: neither it nor a third is known to be wrong."""
    drive = make_drive(guess_period=1000, speculative_tokens=4)
    drive.submit(0, PROMPTS[0], max_tokens=20)
    drive.step()
    plan = drive.scheduler.plan()
    output = drive.runner.launch(plan.step).wait()
    [tokens], [guesses] = output.token_ids, output.guesses.values()
    assert guesses == tokens[:4]
    outcome = drive.scheduler.apply(plan, replace(output, token_ids=[tokens[:2]]))
    drive.scheduler.check()
    assert outcome.drafts == [(0, 4, 2)]


def simulate(
    make_drive: MakeDrive, guess_s: float, guess_period: int, num_requests: int = 1
) -> tuple[Any, float]:
    """Run requests of 300 tokens with a clock; a step takes `guess_s` more for each guess.

    Return also the time of all decodes.
    """
    drive = make_drive(
        guess_period=guess_period,
        num_pages=900,
        max_model_len=600,
        max_num_seqs=16,
        max_num_batched_tokens=64,
    )
    for request_id in range(num_requests):
        drive.submit(request_id, (request_id + 1,), max_tokens=300)
    total_s = 0.0
    while drive.scheduler.has_work:
        plan = drive.scheduler.plan()
        decodes_s = DECODE_S + 0.1 * plan.num_decodes if plan.num_decodes else 0.0
        elapsed_s = decodes_s + guess_s * plan.num_guessed_tokens
        drive.plans.append(plan)
        drive.apply(plan, elapsed_s + 0.1 * plan.num_prompt_tokens)
        total_s += elapsed_s
    for request_id in range(num_requests):
        assert drive.outputs[request_id] == drive.expected((request_id + 1,), 300)
    return drive, total_s


@pytest.mark.parametrize("num_requests", [1, 4])
@pytest.mark.parametrize("guess_s", [0.5, 3.0, 8.0, 25.0])
@pytest.mark.parametrize("guess_period", [1, 2, 4])
def test_no_run_is_slower(
    make_drive: MakeDrive, guess_period: int, guess_s: float, num_requests: int
) -> None:
    _, total_s = simulate(make_drive, guess_s, guess_period, num_requests)
    assert total_s < 1.04 * 300 * (DECODE_S + 0.1 * num_requests)


def test_right_guesses_that_cost_a_third_of_a_step_are_worth_it(make_drive: MakeDrive) -> None:
    drive, total_s = simulate(make_drive, 3.5, 1000)
    assert total_s < 0.5 * 300 * DECODE_S
    late = drive.plans[6:-2]
    assert sum(plan.num_guessed_tokens for plan in late) > 10 * len(late) > 0


def test_wrong_guesses_are_one_of_sixteen_steps(make_drive: MakeDrive) -> None:
    drive, _ = simulate(make_drive, 1.0, 1)
    num_guessed = sum(bool(plan.num_guessed_tokens) for plan in drive.plans)
    assert 300 / TRIAL_STEPS - 4 <= num_guessed <= 300 / TRIAL_STEPS + 10


def test_each_kind_of_drafts_has_a_price_of_its_own() -> None:
    pacing = Pacing(3.0)
    pacing.observe(10.0, num_decodes=2, num_prompt_tokens=0)
    pacing.observe(12.0, num_decodes=2, num_prompt_tokens=0, num_draft_tokens=4)
    drafted = {"num_decodes": 2, "num_prompt_tokens": 0}
    pacing.observe(18.0, **drafted, num_draft_tokens=6, num_guessed_tokens=2)
    assert pacing.text_price.token_s == pytest.approx(0.5)
    assert pacing.model_price.token_s == pytest.approx(3.0)
    # Sixteen guesses take five decodes as they must: no outlier.
    for _ in range(40):
        pacing.observe(10.0 + 16 * 3.0, **drafted, num_draft_tokens=16, num_guessed_tokens=16)
    assert pacing.model_price.token_s == pytest.approx(3.0)
    assert pacing.text_price.token_s == pytest.approx(0.5)
