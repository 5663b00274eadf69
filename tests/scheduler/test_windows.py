"""Sequences under a window hold the keys in view and a chunk, no matter how long they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cache.allocation import Allocation
from cache.misses import MissReason
from cache.view import View
from model.fake import fake_output

Drive = Any
MakeDrive = Callable[..., Drive]
WINDOW, CHUNK, PAGE_SIZE = 256, 64, 16
VIEW = View(window=WINDOW)
MOST_PAGES = (WINDOW + CHUNK) // PAGE_SIZE + 2


def drive_of(make_drive: MakeDrive, num_pages: int, view: View = VIEW) -> Drive:
    return make_drive(
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        view=view,
        max_model_len=20_000,
        max_num_batched_tokens=CHUNK,
    )


def run(drive: Drive) -> int:
    """Run to the end; return the most pages that were held in a step."""
    most = 0
    for number in range(20_000):
        if not drive.scheduler.has_work:
            drive.scheduler.check()
            return most
        plan = drive.scheduler.plan()
        if plan is None:
            continue
        outcome = drive.scheduler.apply(plan, drive.runner.launch(plan.step).wait())
        for request_id, token_id in zip(outcome.request_ids, outcome.token_ids, strict=True):
            drive.outputs[request_id].append(token_id)
        drive.runner.pages.forget(drive.cache._pool.free_ids[-MOST_PAGES:])
        if number % 50 == 0:
            drive.scheduler.check()
        stats = drive.cache.stats()
        most = max(most, stats.pages_private + stats.pages_leased)
    raise AssertionError("it does not end")


@pytest.mark.parametrize(
    ("num_prompt", "num_output"), [(8000, 8), (8, 8000), (4000, 4000)], ids=str
)
@pytest.mark.parametrize("num_pages", [MOST_PAGES, 1024])
def test_pages_behind_the_window_are_given_back(
    make_drive: MakeDrive, num_prompt: int, num_output: int, num_pages: int
) -> None:
    drive = drive_of(make_drive, num_pages)
    prompt = [1 + i * i % 61 for i in range(num_prompt)]
    drive.submit(0, prompt, max_tokens=num_output)
    assert run(drive) <= MOST_PAGES
    assert drive.outputs[0] == fake_output(prompt, num_output, view=VIEW)
    assert drive.scheduler.stats().preemptions_total == 0
    if num_pages > MOST_PAGES:
        # Memory was not short: sharing is as good as without a window.
        drive.submit(1, prompt, max_tokens=1)
        plan = drive.step()
        assert plan is not None
        assert drive.started(plan) == [(1, num_prompt - 1, MissReason.COMPLETE)]
        assert drive.outputs[1] == drive.outputs[0][:1]


def test_chunks_become_smaller_where_the_pool_is(make_drive: MakeDrive) -> None:
    num_pages = WINDOW // PAGE_SIZE + 1
    drive = drive_of(make_drive, num_pages)
    prompt = [1 + i * i % 61 for i in range(2000)]
    drive.submit(0, prompt, max_tokens=5)
    assert run(drive) <= num_pages
    assert drive.outputs[0] == fake_output(prompt, 5, view=VIEW)


def test_a_pool_smaller_than_the_window_bounds_the_length(make_drive: MakeDrive) -> None:
    drive = drive_of(make_drive, WINDOW // PAGE_SIZE)
    refused = drive.submit(0, [1] * (WINDOW + 1))
    assert refused is not None
    assert f"at most {WINDOW + 1} tokens fit" in refused.message
    assert drive.submit(1, [1] * (WINDOW - 2), max_tokens=8) is None
    run(drive)
    assert len(drive.outputs[1]) == 3


@pytest.mark.parametrize("view", [VIEW, View(24, 40)])
def test_many_share_a_small_pool(make_drive: MakeDrive, view: View) -> None:
    """Long prompts with one beginning, which preempt each other and come back."""
    drive = drive_of(make_drive, 2 * MOST_PAGES, view)
    prompts = [[1 + i * i % 61 for i in range(600)] + [n] * 50 for n in range(1, 6)]
    for n, prompt in enumerate(prompts):
        drive.submit(n, prompt, max_tokens=300)
    run(drive)
    for n, prompt in enumerate(prompts):
        assert drive.outputs[n] == fake_output(prompt, 300, view=view)


def test_no_queue_refuses_no_long_prompt_that_fits_under_its_window(make_drive: MakeDrive) -> None:
    drive = make_drive(
        num_pages=2 * MOST_PAGES,
        page_size=PAGE_SIZE,
        view=VIEW,
        max_model_len=20_000,
        max_num_batched_tokens=CHUNK,
        max_queue=0,
    )
    assert drive.submit(0, [1] * 8000, max_tokens=2) is None


def test_a_step_under_way_still_reads_what_the_next_one_does_not(make_drive: MakeDrive) -> None:
    """Pages are dropped only once the step that read them last is over."""
    drive = make_drive(num_pages=16, page_size=2, view=View(window=4), max_num_batched_tokens=8)
    drive.runner.max_steps_in_flight = 2
    drive.submit(0, [1, 2, 3, 4, 5, 6, 7], max_tokens=6)
    for _ in range(3):
        plans = [drive.scheduler.plan(), drive.scheduler.plan()]
        in_flight_steps = [drive.runner.launch(plan.step) for plan in plans if plan is not None]
        for plan, in_flight_step in zip(plans, in_flight_steps, strict=True):
            assert plan is not None
            outcome = drive.scheduler.apply(plan, in_flight_step.wait())
            drive.outputs[0] += outcome.token_ids
            drive.scheduler.check()
            held = drive.cache.stats().pages_private + drive.cache.stats().pages_leased
            assert held <= 4
            drive.runner.pages.forget(drive.cache._pool.free_ids)
    assert drive.outputs[0] == fake_output([1, 2, 3, 4, 5, 6, 7], 6, view=View(window=4))


def test_a_prompt_that_finds_no_room_gives_its_own_back(make_drive: MakeDrive) -> None:
    view = View(window=4)
    drive = make_drive(num_pages=8, page_size=2, view=view, max_num_batched_tokens=8)
    prompt = list(range(1, 31))
    drive.submit(0, prompt, max_tokens=3)
    others: list[Allocation] = []
    for count in (8, 4, 0):
        plan = drive.scheduler.plan()
        assert [row.count for row in plan.step.rows] == [count] if count else plan is None
        if plan is not None:
            drive.scheduler.apply(plan, drive.runner.launch(plan.step).wait())
        while taken := drive.cache.admit([60 + len(others), 1], f"other {len(others)}"):
            others.append(taken)
    assert drive.scheduler.stats().preemptions_total == 1
    for taken in others:
        drive.cache.free(taken, [1, 1], 0)
    drive.run()
    assert drive.outputs[0] == fake_output(prompt, 3, view=view)
