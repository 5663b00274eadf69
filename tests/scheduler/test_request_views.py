"""Requests with a view of their own, beside others, in a model that sees all keys."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from cache.misses import MissReason
from cache.view import FULL_VIEW, View
from model.fake import fake_output

MakeDrive = Callable[..., Any]
PAGE_SIZE, CHUNK = 16, 64
WINDOW, SINKS = View(window=256), View(4, 252)
#: Of one sequence: sinks, window and chunk, each begun and ended anywhere in a page.
MOST_PAGES = (256 + CHUNK) // PAGE_SIZE + 3


def drive_of(make_drive: MakeDrive, num_pages: int, **config: Any) -> Any:
    settings: dict[str, Any] = {
        "num_pages": num_pages,
        "page_size": PAGE_SIZE,
        "max_model_len": 320,
        "max_num_batched_tokens": CHUNK,
    }
    return make_drive(**settings | config)


def text(num_tokens: int, end: int = 1) -> list[int]:
    return [*(1 + i * i % 61 for i in range(num_tokens - 1)), end]


def run(drive: Any) -> int:
    """Run to the end; return the most pages that were held in a step."""
    most = 0
    for number in range(20_000):
        if not drive.scheduler.has_work:
            drive.scheduler.check()
            return most
        plan = drive.scheduler.plan()
        if plan is None:
            continue
        drive.apply(plan)
        # All pages that are read from now on were written by a later step, or are held.
        drive.runner.pages.forget(drive.cache._pool.free_ids)
        if number % 50 == 0:
            drive.scheduler.check()
        stats = drive.cache.stats()
        most = max(most, stats.pages_private + stats.pages_leased)
    raise AssertionError("it does not end")


@pytest.mark.parametrize("view", [WINDOW, SINKS], ids=str)
@pytest.mark.parametrize(("num_prompt", "num_output"), [(6000, 8), (8, 3000), (700, 700)], ids=str)
def test_a_sequence_longer_than_pool_and_context_holds_its_view_alone(
    make_drive: MakeDrive, view: View, num_prompt: int, num_output: int
) -> None:
    drive = drive_of(make_drive, MOST_PAGES)
    prompt = text(num_prompt)
    drive.submit(0, prompt, max_tokens=num_output, own_view=view)
    assert run(drive) <= MOST_PAGES
    assert drive.outputs[0] == fake_output(prompt, num_output, view=view)
    assert drive.scheduler.stats().preemptions_total == 0
    stats = drive.cache.stats()
    assert stats.pages_free + stats.pages_cached == MOST_PAGES


def test_prompts_of_all_views_share_what_no_view_hides(make_drive: MakeDrive) -> None:
    drive = drive_of(make_drive, 200, max_model_len=2000)
    views = [FULL_VIEW, WINDOW, SINKS, View(window=64)]
    for number, view in enumerate(views):
        prompt = text(600, end=number + 1)
        drive.submit(number, prompt, max_tokens=3, own_view=view)
        plan = drive.step()
        reused = {0: 0, 1: 256, 2: 256, 3: 64}[number]
        reason = MissReason.VIEW if number else MissReason.NEVER
        assert drive.started(plan) == [(number, reused, reason)]
        run(drive)
        assert drive.outputs[number] == fake_output(prompt, 3, view=view)
    again = text(600, end=9)
    drive.submit(9, again, max_tokens=3)
    assert drive.started(drive.step()) == [(9, 592, MissReason.NEVER)], "all whole pages are there"
    run(drive)
    assert drive.outputs[9] == fake_output(again, 3)


def test_a_bounded_request_leaves_its_first_tokens_to_all(make_drive: MakeDrive) -> None:
    drive = drive_of(make_drive, 200, max_model_len=2000)
    prompt = text(600)
    drive.submit(0, prompt, max_tokens=3, own_view=SINKS)
    run(drive)
    drive.submit(1, prompt, max_tokens=3)
    assert drive.started(drive.step()) == [(1, 256, MissReason.NEVER)]
    run(drive)
    assert drive.outputs[1] == fake_output(prompt, 3)


def test_bounded_and_full_requests_preempt_each_other(make_drive: MakeDrive) -> None:
    drive = drive_of(make_drive, 2 * MOST_PAGES, max_num_batched_tokens=32)
    views = [WINDOW, FULL_VIEW, SINKS, FULL_VIEW, View(window=64), FULL_VIEW]
    for number, view in enumerate(views):
        drive.submit(number, text(200, end=number + 1), max_tokens=100, own_view=view)
    run(drive)
    assert drive.scheduler.stats().preemptions_total > 0
    for number, view in enumerate(views):
        assert drive.outputs[number] == fake_output(text(200, end=number + 1), 100, view=view)


@pytest.mark.parametrize("num_in_flight", [1, 2])
def test_a_prompt_that_evicts_the_pages_it_passed_reads_none_of_them(
    make_drive: MakeDrive, num_in_flight: int
) -> None:
    """The pages that it shares with others go, too, once they are out of its view."""
    drive = drive_of(make_drive, MOST_PAGES + 4)
    drive.runner.max_steps_in_flight = num_in_flight
    drive.submit(0, text(300), max_tokens=1)
    run(drive)
    prompt = [*text(300), *text(900)]
    drive.submit(1, prompt, max_tokens=40, own_view=SINKS)
    run(drive)
    assert drive.outputs[1] == fake_output(prompt, 40, view=SINKS)
    assert drive.cache.stats().evicted_pages_total > 0


def test_a_view_of_the_model_that_is_narrower_counts(make_drive: MakeDrive) -> None:
    own = View(window=64)
    drive = drive_of(make_drive, 40, view=own, max_model_len=2000)
    prompt = text(500)
    drive.submit(0, prompt, max_tokens=4, own_view=SINKS)
    run(drive)
    assert drive.outputs[0] == fake_output(prompt, 4, view=own)
    narrower = View(2, 20)
    drive.submit(1, prompt, max_tokens=4, own_view=narrower)
    assert drive.started(drive.step()) == [(1, narrower.max_keys, MissReason.VIEW)]
    run(drive)
    assert drive.outputs[1] == fake_output(prompt, 4, view=narrower)


@pytest.mark.parametrize(
    ("view", "num_prompt", "message"),
    [
        (FULL_VIEW, 320, "at most 320 tokens fit"),
        (View(4, 317), 320, "at most 320 tokens fit"),
        (View(4, 316), 320, ""),
        # Its window does not fit into the pool, so the length is bounded by the pool.
        (View(4, 316), 10 * PAGE_SIZE + 1, "at most 161 tokens fit"),
    ],
)
def test_the_longest_sequence_depends_on_the_view(
    make_drive: MakeDrive, view: View, num_prompt: int, message: str
) -> None:
    drive = drive_of(make_drive, 10 if "161" in message else 64)
    refused = drive.submit(0, text(num_prompt), own_view=view)
    assert (refused.message if refused else "").endswith(
        message and f"{message}, prompt and answer together"
    )
    assert bool(refused) == bool(message)


def test_a_bounded_prompt_finds_room_where_there_is_no_queue(make_drive: MakeDrive) -> None:
    drive = drive_of(make_drive, MOST_PAGES, max_queue=0)
    assert drive.submit(0, text(1000), max_tokens=2, own_view=SINKS) is None
    run(drive)


def test_a_waiting_bounded_request_is_looked_up_anew(make_drive: MakeDrive) -> None:
    drive = drive_of(make_drive, MOST_PAGES, max_num_seqs=4)
    prompts = [text(400, end=number + 1) for number in range(4)]
    for number, prompt in enumerate(prompts):
        drive.submit(number, prompt, max_tokens=20, own_view=SINKS)
    run(drive)
    for number, prompt in enumerate(prompts):
        assert drive.outputs[number] == fake_output(prompt, 20, view=SINKS)


def test_pages_are_dropped_once_and_in_order(make_drive: MakeDrive) -> None:
    drive = drive_of(make_drive, 64)
    drive.submit(0, text(100), max_tokens=900, own_view=View(4, 60))
    held = []
    while drive.scheduler.has_work:
        drive.step()
        stats = drive.cache.stats()
        held.append(stats.pages_private + stats.pages_leased)
    late = held[200:-1]
    assert max(late) <= 64 // PAGE_SIZE + 3
    assert all(abs(after - before) <= 1 for before, after in pairwise(late))
