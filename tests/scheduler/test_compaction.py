"""Sequences that keep a fixed number of keys, beside others: when they drop the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from scripted_drafter import ScriptedDrafter

from cache.misses import MissReason
from cache.selection import Selection
from model.fake import Fault, FaultKind, fake_output
from model.interface import InFlightStep, SamplingParams
from scheduler.plan import StepPlan
from scheduler.sequence import State

MakeDrive = Callable[..., Any]
PAGE_SIZE, CHUNK = 4, 24
SELECTION = Selection(window=5, capacity=16, interval=10)


def drive_of(make_drive: MakeDrive, num_pages: int = 64, **config: Any) -> Any:
    settings: dict[str, Any] = {"num_pages": num_pages, "max_num_batched_tokens": CHUNK}
    return make_drive(page_size=PAGE_SIZE, **settings | config)


def text(num_tokens: int, end: int = 1) -> list[int]:
    return [*(1 + i * i % 61 for i in range(num_tokens - 1)), end]


def apply(drive: Any, plan: StepPlan) -> None:
    """Process a step; assert that none of its rows crosses a compaction point."""
    drive.plans.append(plan)
    for sequence, position, count in zip(
        plan.sequences, plan.step.positions, plan.step.counts, strict=True
    ):
        if sequence.selection is not None:
            point = sequence.selection.next_point(position, sequence.num_prompt)
            assert position + count <= point
    drive.apply(plan)
    # All pages that are read from now on are written by a later step, or are held.
    drive.runner.pages.forget(drive.cache._pool.free_ids)
    drive.scheduler.check()


def run(drive: Any) -> int:
    """Run to the end; return the most pages that were held in a step."""
    most = 0
    for _ in range(2000):
        if not drive.scheduler.has_work:
            return most
        plan = drive.scheduler.plan()
        if plan is not None:
            apply(drive, plan)
        stats = drive.cache.stats()
        most = max(most, stats.pages_private + stats.pages_leased)
    raise AssertionError("it does not end")


@pytest.mark.parametrize(("num_prompt", "num_output"), [(3, 150), (26, 60), (27, 60), (90, 100)])
def test_a_sequence_holds_its_bound_from_the_first_step_to_the_last(
    make_drive: MakeDrive, num_prompt: int, num_output: int
) -> None:
    num_pages = SELECTION.num_pages(num_prompt, PAGE_SIZE)
    drive, prompt = drive_of(make_drive, num_pages), text(num_prompt)
    drive.submit(0, prompt, max_tokens=num_output, selection=SELECTION)
    assert run(drive) == num_pages
    expected = fake_output(prompt, num_output, selection=SELECTION)
    assert drive.outputs[0] == expected
    assert expected != fake_output(prompt, num_output)
    late = [plan.step for plan in drive.plans if plan.step.dropped]
    assert {len(step.page_ids[0]) for step in late} == {-(-SELECTION.max_keys // PAGE_SIZE)}
    assert {step.rows[0].stored for step in late} == set(range(16, 26))


@pytest.mark.parametrize("num_in_flight", [1, 2, 3])
def test_steps_under_way_land_before_keys_are_dropped(
    make_drive: MakeDrive, num_in_flight: int
) -> None:
    drive = drive_of(make_drive)
    drive.runner.max_steps_in_flight = num_in_flight
    prompts = {0: text(40), 1: text(30, 2), 2: text(50, 3)}
    # The third fills whole pages. Two of them come from another engine, so chunks end at points.
    selections = {0: SELECTION, 1: None, 2: Selection(2, 9, interval=3)}
    expected = {
        number: fake_output(prompt, 60, selection=selections[number])
        for number, prompt in prompts.items()
    }
    known = {0: 30, 1: 0, 2: 20}
    for number, prompt in prompts.items():
        drive.submit(
            number,
            prompt,
            max_tokens=60,
            selection=selections[number],
            output_token_ids=tuple(expected[number][: known[number]]),
        )
    under_way: list[tuple[StepPlan, InFlightStep]] = []
    while drive.scheduler.has_work:
        while len(under_way) < num_in_flight and (plan := drive.scheduler.plan()):
            under_way.append((plan, drive.runner.launch(plan.step)))
        plan, step = under_way.pop(0)
        outcome = drive.scheduler.apply(plan, step.wait())
        for number, token_id in zip(outcome.request_ids, outcome.token_ids, strict=True):
            drive.outputs[number].append(token_id)
        drive.scheduler.check()
    for number, tokens in expected.items():
        assert drive.outputs[number] == tokens[known[number] :]


def test_prompts_are_shared_and_answers_are_not(make_drive: MakeDrive) -> None:
    drive, prompt = drive_of(make_drive, 128), text(60)
    drive.submit(0, prompt, max_tokens=60, selection=SELECTION)
    run(drive)
    drive.submit(1, [*prompt, *drive.outputs[0], 1], max_tokens=1)
    assert drive.started(drive.step()) == [(1, 60, MissReason.NEVER)], (
        "behind the prompt keys are missing"
    )
    run(drive)
    for number, length in ((2, 60), (3, 50)):
        again = text(60)[:length]
        drive.submit(number, again, max_tokens=60, selection=SELECTION)
        # The queries of the window before the first point are computed anew.
        assert drive.started(drive.step()) == [(number, length - 5, MissReason.LIMITED)]
        run(drive)
        assert drive.outputs[number] == fake_output(again, 60, selection=SELECTION)


@pytest.mark.parametrize("num_known", [1, 26, 27, 59])
@pytest.mark.parametrize("num_prompt", [4, 30])
def test_another_engine_goes_on_with_the_same_keys(
    make_drive: MakeDrive, num_prompt: int, num_known: int
) -> None:
    drive, prompt = drive_of(make_drive), text(num_prompt)
    expected = fake_output(prompt, 60, selection=SELECTION)
    known = tuple(expected[:num_known])
    drive.submit(0, prompt, max_tokens=60, selection=SELECTION, output_token_ids=known)
    run(drive)
    assert [*known, *drive.outputs[0]] == expected


def test_others_are_preempted_before_a_sequence_that_would_lose_its_keys(
    make_drive: MakeDrive,
) -> None:
    drive = drive_of(make_drive, 40)
    drive.submit(0, text(20), max_tokens=100, priority=1, selection=SELECTION)
    for number in (1, 2):
        drive.submit(number, text(20, number), max_tokens=60)
    [kept] = [one for one in drive.scheduler._waiting if one.request_id == 0]
    while drive.scheduler.has_work:
        apply(drive, drive.scheduler.plan())
        assert "preempted" not in kept.history
    assert drive.scheduler.stats().preemptions_total > 0
    assert drive.outputs[0] == fake_output(text(20), 100, selection=SELECTION)
    for number in (1, 2):
        assert drive.outputs[number] == fake_output(text(20, number), 60)


@pytest.mark.parametrize("kind", FaultKind)
@pytest.mark.parametrize("position", [10, 36, 40])
def test_a_sequence_comes_back_from_a_step_that_failed(
    make_drive: MakeDrive, kind: FaultKind, position: int
) -> None:
    """One at fault beside it: it runs alone, and computes its tokens again up to there."""
    drive = drive_of(make_drive, 40)
    drive.runner.faults = {7: Fault(kind, 30)}
    params = SamplingParams(60, ignore_eos=True, seed=7)
    drive.submit(0, text(position), max_tokens=60, selection=SELECTION)
    drive.submit(1, text(12, 2), params=params, selection=SELECTION)
    drive.submit(2, text(12, 3), max_tokens=60)
    while drive.scheduler.has_work:
        plan = drive.scheduler.plan()
        try:
            drive.apply(plan)
        except RuntimeError as error:
            drive.runner._in_flight.clear()
            drive.scheduler.fail(plan, str(error))
        drive.scheduler.check()
    assert set(drive.failed) == {1}
    assert drive.outputs[0] == fake_output(text(position), 60, selection=SELECTION)
    assert drive.outputs[2] == fake_output(text(12, 3), 60)


def test_a_suspect_takes_the_pages_even_of_sequences_that_drop_keys(make_drive: MakeDrive) -> None:
    drive = drive_of(make_drive, SELECTION.num_pages(30, PAGE_SIZE) + 2)
    drive.submit(0, text(30), max_tokens=60, selection=SELECTION)
    for _ in range(20):
        drive.step()
    drive.submit(1, text(5, 2), max_tokens=30)
    plan = drive.scheduler.plan()
    [small] = [one for one in plan.sequences if one.request_id == 1]
    drive.scheduler.fail(plan, "it raised")
    [kept] = [one for one in drive.scheduler._waiting if one.request_id == 0]
    run(drive)
    assert small.state is kept.state is State.FINISHED
    assert drive.outputs[0] == fake_output(text(30), 60, selection=SELECTION)
    assert drive.outputs[1] == fake_output(text(5, 2), 30)


def test_a_suspect_has_room_after_the_compaction_that_is_due(make_drive: MakeDrive) -> None:
    """It fails in the very step that follows a compaction point."""
    selection = Selection(2, 6, interval=2)
    drive = drive_of(make_drive, selection.num_pages(8, PAGE_SIZE))
    drive.submit(0, text(8), max_tokens=30, selection=selection)
    while drive.scheduler.has_work:
        plan = drive.scheduler.plan()
        if plan.step.positions == [14] and not drive.scheduler._suspects:
            drive.scheduler.fail(plan, "it raised")
        else:
            apply(drive, plan)
    assert drive.outputs[0] == fake_output(text(8), 30, selection=selection)


@pytest.mark.parametrize(("num_prompt", "num_pages"), [(40, 17), (8, 9)])
def test_a_request_whose_bound_does_not_fit_is_refused(
    make_drive: MakeDrive, num_prompt: int, num_pages: int
) -> None:
    prompt = text(num_prompt)
    for missing in (1, 0):
        drive = drive_of(make_drive, num_pages - missing)
        refused = drive.submit(0, prompt, max_tokens=60, selection=SELECTION)
        assert (refused is not None) == missing
    drive = drive_of(make_drive, num_pages - 1)
    refused = drive.submit(0, prompt, max_tokens=60, selection=SELECTION)
    assert refused.param == "kv_policy"
    assert refused.message == (
        f"kv_policy: the {num_prompt} tokens of the prompt, and the 26 that are kept behind it, "
        f"need {num_pages} pages of 4 tokens, and there are {num_pages - 1}; a smaller capacity or "
        "a shorter prompt fits"
    )
    # With all keys, and without a token to compute behind the first point, there is room.
    assert drive.submit(1, prompt, max_tokens=1, selection=SELECTION) is None


def test_a_short_answer_is_that_of_all_keys_and_its_pages_are_shared(make_drive: MakeDrive) -> None:
    drive, prompt = drive_of(make_drive), text(10)
    drive.submit(0, prompt, max_tokens=17, selection=SELECTION)
    run(drive)
    assert drive.outputs[0] == fake_output(prompt, 17)
    drive.submit(1, [*prompt, *drive.outputs[0], 1], max_tokens=1)
    assert drive.started(drive.step()) == [(1, 24, MissReason.NEVER)]


def test_no_draft_is_verified_where_queries_count(make_drive: MakeDrive) -> None:
    drive = drive_of(make_drive, drafter=ScriptedDrafter(lambda *_: [1, 2]))
    drive.submit(0, text(30), max_tokens=40, selection=SELECTION)
    run(drive)
    assert drive.drafts == []
    drive.submit(1, text(30), max_tokens=40)
    run(drive)
    assert {number for number, _, _ in drive.drafts} == {1}


def test_scores_of_the_prompt_are_those_of_all_keys(make_drive: MakeDrive) -> None:
    drive, params = drive_of(make_drive), SamplingParams(50, ignore_eos=True, prompt_logprobs=0)
    for number, selection in enumerate((None, SELECTION, SELECTION)):
        drive.submit(number, text(40), params=params, selection=selection)
        run(drive)
    assert drive.scores[0] == drive.scores[1] == drive.scores[2]
