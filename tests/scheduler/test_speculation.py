"""Drafts change no token, whatever they are, and nothing is preempted for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from scripted_drafter import ScriptedDrafter

from model.fake import FAKE_EOS_TOKEN_ID, Fault, FaultKind, fake_logprobs, fake_output
from model.interface import PENDING_TOKEN, SamplingParams
from scheduler.messages import FinishReason
from scheduler.sequence import State

MakeDrive = Callable[..., Any]
PROMPTS = {0: (1, 2, 3), 1: (1, 2, 3, 4, 5, 6, 7, 8, 9), 2: (9, 9)}


def drafter(period: int = 1000, *, is_too_long: bool = False) -> ScriptedDrafter:
    """Return one that is right but at positions that are multiples of `period`."""

    def guess(token_ids: list[int], max_tokens: int) -> list[int]:
        known = len(token_ids)
        right = fake_output(token_ids, max_tokens + 3)
        return [63 if p % period == 0 else one for p, one in enumerate(right, known)]

    return ScriptedDrafter(guess, is_too_long=is_too_long)


def started(make_drive: MakeDrive, prompt: Sequence[int] = PROMPTS[0], **options: Any) -> Any:
    """Return a drive whose first request has one token."""
    params = options.pop("params", SamplingParams(20, ignore_eos=True))
    drive = make_drive(**{"drafter": drafter()} | options)
    drive.submit(0, prompt, params=params)
    drive.step()
    return drive


@pytest.mark.parametrize("num_pages", [9, 64])
@pytest.mark.parametrize("budget", [4, 32])
@pytest.mark.parametrize("period", [1, 3, 1000])
def test_drafts_change_no_token(
    make_drive: MakeDrive, period: int, budget: int, num_pages: int
) -> None:
    script = drafter(period, is_too_long=True)
    drive = make_drive(
        drafter=script, max_num_batched_tokens=budget, max_num_seqs=4, num_pages=num_pages
    )
    for request_id, prompt in PROMPTS.items():
        drive.submit(request_id, prompt, max_tokens=9 + request_id)
    drive.run()
    assert drive.outputs == {n: drive.expected(prompt, 9 + n) for n, prompt in PROMPTS.items()}
    assert drive.finished == dict.fromkeys(PROMPTS, FinishReason.LENGTH)
    assert script.observed == drive.outputs
    assert len(script.forgotten) == len(PROMPTS)
    is_tight = num_pages == 9 and budget == 32
    assert (drive.scheduler.stats().preemptions_total > 0) == is_tight


def test_accepted_tokens_save_steps(make_drive: MakeDrive) -> None:
    drive = started(make_drive, speculative_tokens=3)
    drive.run()
    assert drive.outputs[0] == drive.expected(PROMPTS[0], 20)
    # 1 token with the prompt, then 4 a step; the last step has a draft of 2.
    assert [plan.num_draft_tokens for plan in drive.plans] == [0, 3, 3, 3, 3, 2]
    [counts] = drive.scheduler.stats().speculation.drafters
    assert counts == ("scripted", 14, 14)
    assert drive.scheduler.stats().speculation.accepted_by_position == (5, 5, 4)
    assert drive.drafts == [(0, 3, 3)] * 4 + [(0, 2, 2)]


def test_the_first_wrong_token_ends_a_draft(make_drive: MakeDrive) -> None:
    drive = started(make_drive, drafter=drafter(7), speculative_tokens=5)
    drive.step()
    # Positions 4 to 8 are drafted, of which 7 is wrong.
    assert drive.drafts == [(0, 5, 3)]
    assert drive.outputs[0] == drive.expected(PROMPTS[0], 5)


def test_tokens_behind_the_end_are_dropped(make_drive: MakeDrive) -> None:
    prompt = next(
        (n,)
        for n in range(1, 64)
        if FAKE_EOS_TOKEN_ID in fake_output((n,), 12, may_end=True)[4:]
        and FAKE_EOS_TOKEN_ID not in fake_output((n,), 4, may_end=True)
    )
    wanted = fake_output(prompt, 30, may_end=True)
    wanted = wanted[: wanted.index(FAKE_EOS_TOKEN_ID) + 1]

    def guess(token_ids: list[int], max_tokens: int) -> list[int]:
        return fake_output(token_ids, max_tokens, may_end=True)

    stops = SamplingParams(20)
    drive = started(make_drive, prompt, params=stops, drafter=ScriptedDrafter(guess))
    drive.run()
    assert drive.outputs[0] == wanted
    assert drive.finished == {0: FinishReason.STOP}
    # No draft has the end in it.
    assert [draft[1] for draft in drive.drafts] == [len(wanted) - 2]


def test_a_stop_token_inside_a_draft_ends_the_request(make_drive: MakeDrive) -> None:
    """A token that ends a request only behind `min_tokens` is drafted before."""
    wanted = fake_output(PROMPTS[0], 20)
    stop = SamplingParams(20, ignore_eos=True, stop_token_ids=(wanted[6],))
    script = drafter()
    drive = started(make_drive, params=stop, drafter=script)
    sequence = drive.scheduler._running[0]
    sequence.stop_ids = frozenset()  # as if the draft were made before the request had ends
    plan = drive.scheduler.plan()
    sequence.stop_ids = frozenset({wanted[6]})
    drive.apply(plan)
    assert drive.outputs[0] == wanted[:7]
    assert drive.finished == {0: FinishReason.STOP}
    assert drive.drafts == [(0, 16, 6)]


def test_a_step_with_prompts_has_no_drafts(make_drive: MakeDrive) -> None:
    drive = started(make_drive, max_num_batched_tokens=16)
    for prompt, has_drafts in ((range(10, 22), False), (range(30, 40), False), (None, True)):
        if prompt is not None:
            drive.submit(prompt[0], prompt)
        plan = drive.step()
        assert bool(plan.num_prompt_tokens) == (prompt is not None)
        assert bool(plan.num_draft_tokens) == has_drafts


def test_decodes_that_take_the_whole_budget_leave_none_to_drafts(make_drive: MakeDrive) -> None:
    drive = make_drive(drafter=drafter(), max_num_seqs=2, max_num_batched_tokens=2)
    for request_id in (0, 1):
        drive.submit(request_id, PROMPTS[0], max_tokens=20)
    drive.run()
    assert any(plan.num_decodes == 2 for plan in drive.plans)
    assert not any(plan.num_draft_tokens for plan in drive.plans if plan.num_decodes == 2)


def test_rows_share_the_budget(make_drive: MakeDrive) -> None:
    drive = make_drive(drafter=drafter(), max_num_batched_tokens=9)
    for request_id in range(3):
        drive.submit(request_id, (request_id + 1,), may_speculate=request_id > 0, max_tokens=40)
    drive.step()
    plan = drive.step()
    assert {row: len(draft.token_ids) for row, draft in plan.drafts.items()} == {1: 3, 2: 3}


def test_nothing_is_preempted_for_a_draft(make_drive: MakeDrive) -> None:
    """With no page to spare a draft ends with the pages that its sequence holds."""
    drive = make_drive(drafter=drafter(), num_pages=4)
    drive.submit(0, (1, 2), max_tokens=14)
    drive.submit(1, (3, 4), max_tokens=3)
    drive.step()
    plan = drive.step()
    # Of four pages each has one: two are left, which the two sequences may need next.
    assert {row: len(draft.token_ids) for row, draft in plan.drafts.items()} == {0: 1, 1: 1}
    drive.run()
    assert drive.outputs == {0: drive.expected((1, 2), 14), 1: drive.expected((3, 4), 3)}
    assert drive.scheduler.stats().preemptions_total == 0


def test_a_request_may_go_without(make_drive: MakeDrive) -> None:
    script = drafter()
    drive = make_drive(drafter=script)
    drive.submit(0, PROMPTS[0], may_speculate=False)
    drive.run()
    assert script.num_proposals == 0
    assert drive.outputs[0] == drive.expected(PROMPTS[0], 8)
    assert script.observed == drive.outputs


def test_a_sequence_with_drafts_waits_for_its_tokens(make_drive: MakeDrive) -> None:
    drive = started(make_drive)
    drive.runner.max_steps_in_flight = 2
    plan = drive.scheduler.plan()
    assert drive.scheduler.awaits_tokens
    assert drive.scheduler.plan() is None
    drive.apply(plan)
    drive.run()
    assert drive.outputs[0] == drive.expected(PROMPTS[0], 20)


def test_no_drafts_behind_a_pending_token(make_drive: MakeDrive) -> None:
    script = drafter()
    drive = make_drive(drafter=script)
    drive.submit(0, PROMPTS[0], max_tokens=4)
    first, second = drive.scheduler.plan(), drive.scheduler.plan()
    assert second.step.token_ids == [PENDING_TOKEN]
    assert script.num_proposals == 0
    drive.runner.max_steps_in_flight = 2
    flights = [drive.runner.launch(plan.step) for plan in (first, second)]
    for plan, flight in zip((first, second), flights, strict=True):
        drive.scheduler.apply(plan, flight.wait())
    drive.run()
    assert drive.outputs[0] == drive.expected(PROMPTS[0], 4)[2:]


def test_preempted_while_drafts_are_verified(make_drive: MakeDrive) -> None:
    """The accepted tokens are had; their keys are computed again."""
    drive = started(make_drive, speculative_tokens=4)
    plan = drive.scheduler.plan()
    [sequence] = drive.scheduler._running
    drive.scheduler._table.preempt(sequence)
    drive.apply(plan)
    drive.scheduler.check()
    assert sequence.state is State.WAITING
    assert drive.outputs[0] == drive.expected(PROMPTS[0], 6)
    drive.run()
    assert drive.outputs[0] == drive.expected(PROMPTS[0], 20)


def test_cancelled_while_drafts_are_verified(make_drive: MakeDrive) -> None:
    drive = started(make_drive)
    plan = drive.scheduler.plan()
    drive.scheduler.cancel(0)
    drive.apply(plan)
    drive.scheduler.check()
    assert len(drive.outputs[0]) == 1
    assert drive.drafts == []


def test_without_a_token_nothing_is_learned(make_drive: MakeDrive) -> None:
    """The mask of a grammar was late."""
    drive = started(make_drive)
    plan = drive.scheduler.plan()
    output = drive.runner.launch(plan.step).wait()
    outcome = drive.scheduler.apply(plan, replace(output, token_ids=[[]]))
    drive.scheduler.check()
    assert outcome.token_ids == outcome.drafts == []
    assert drive.scheduler.stats().late_rows_total == 1
    drive.run()
    assert drive.outputs[0] == drive.expected(PROMPTS[0], 20)


@pytest.mark.parametrize("kind", [FaultKind.NOT_FINITE, FaultKind.LAUNCH])
def test_a_request_fails_at_the_same_place(make_drive: MakeDrive, kind: FaultKind) -> None:
    """Drafts may reach the fault before their sequence does."""
    drive = make_drive(drafter=drafter())
    drive.runner.faults = {7: Fault(kind, 9)}
    drive.submit(0, PROMPTS[0], params=SamplingParams(20, ignore_eos=True, seed=7))
    drive.submit(1, PROMPTS[1], max_tokens=12)
    for _ in range(80):
        if (plan := drive.scheduler.plan()) is None:
            break
        try:
            drive.apply(plan)
        except RuntimeError:
            drive.scheduler.fail(plan, "it raised")
        drive.scheduler.check()
    assert drive.outputs[0] == drive.expected(PROMPTS[0], 7)
    assert list(drive.failed) == [0]
    assert drive.outputs[1] == drive.expected(PROMPTS[1], 12)


def test_resumed_by_another_engine(make_drive: MakeDrive) -> None:
    drive = make_drive(drafter=drafter(5))
    before = tuple(drive.expected(PROMPTS[0], 6))
    drive.submit(0, PROMPTS[0], max_tokens=20, output_token_ids=before, is_resumed=True)
    drive.run()
    assert [*before, *drive.outputs[0]] == drive.expected(PROMPTS[0], 20)


def test_scores_of_prompts_stay(make_drive: MakeDrive) -> None:
    drive = make_drive(drafter=drafter(), max_num_batched_tokens=8)
    drive.submit(0, PROMPTS[0], max_tokens=20)
    drive.step()
    prompt = PROMPTS[1]
    drive.submit(1, prompt, params=SamplingParams(6, prompt_logprobs=1, ignore_eos=True))
    drive.run()
    assert drive.scores[1] == [fake_logprobs(prompt[:i], prompt[i], 1) for i in range(1, 9)]
    assert drive.outputs[1] == drive.expected(prompt, 6)


def test_only_accepted_tokens_are_cached(make_drive: MakeDrive) -> None:
    drive = started(make_drive, drafter=drafter(5), speculative_tokens=6)
    drive.run()
    text = (*PROMPTS[0], *drive.outputs[0])
    assert drive.cache.match(text).num_tokens == 20
    wrong = [*text[:5], 63, *fake_output([*text[:5], 63], 8)]
    assert drive.cache.match(wrong).num_tokens <= 5
