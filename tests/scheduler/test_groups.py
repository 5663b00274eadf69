"""A model of which only some layers have a window: both groups of pages, through the scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from scripted_drafter import ScriptedDrafter

from cache.groups import GroupedCache
from cache.misses import MissReason
from cache.view import FULL_VIEW, View
from model.fake import fake_output
from model.interface import WindowedPages

Drive = Any
MakeDrive = Callable[..., Drive]
WINDOW, CHUNK, PAGE_SIZE = 64, 32, 8
#: Of one sequence, its chunk included.
MOST_WINDOWED = (WINDOW + CHUNK) // PAGE_SIZE + 2


def text(num_tokens: int) -> list[int]:
    return [1 + i * i % 61 for i in range(num_tokens)]


def drive_of(
    make_drive: MakeDrive, num_pages: int, num_windowed_pages: int, **others: Any
) -> Drive:
    return make_drive(
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        windowed=WindowedPages(num_windowed_pages, 4, View(window=WINDOW)),
        max_model_len=4000,
        max_num_batched_tokens=CHUNK,
        **others,
    )


def run(drive: Drive) -> int:
    """Run to the end; return the most windowed pages that were held after a step."""
    most, cache = 0, drive.cache
    assert isinstance(cache, GroupedCache)
    while drive.scheduler.has_work:
        drive.step()
        drive.runner.pages.forget(cache._pool.free_ids)
        drive.runner.windowed_pages.forget(cache.windowed._pool.free_ids)
        stats = cache.windowed.stats()
        most = max(most, stats.pages_private + stats.pages_leased)
    return most


@pytest.mark.parametrize(("num_prompt", "num_output"), [(400, 8), (8, 400), (200, 200)], ids=str)
def test_a_long_sequence_holds_its_window_alone(
    make_drive: MakeDrive, num_prompt: int, num_output: int
) -> None:
    drive = drive_of(make_drive, 52, MOST_WINDOWED)
    prompt = text(num_prompt)
    drive.submit(0, prompt, max_tokens=num_output)
    assert run(drive) <= MOST_WINDOWED
    assert drive.outputs[0] == fake_output(prompt, num_output)
    assert drive.scheduler.stats().preemptions_total == 0
    # All whole pages with keys: a few windowed ones were needed to go on.
    again = [*prompt, *drive.outputs[0]]
    drive.submit(1, again, max_tokens=1)
    plan = drive.step()
    assert plan is not None
    num_reused = (len(again) - 1) // PAGE_SIZE * PAGE_SIZE
    assert drive.started(plan) == [(1, num_reused, MissReason.NEVER)]


def test_many_share_small_groups(make_drive: MakeDrive) -> None:
    """Long prompts with one beginning, with a view or without, which preempt each other."""
    drive = drive_of(make_drive, 60, 3 * MOST_WINDOWED)
    views = [FULL_VIEW, View(4, 40), FULL_VIEW, View(0, 100), FULL_VIEW]
    prompts = [[*text(150), *[n] * 20] for n in range(1, 6)]
    for n, (prompt, view) in enumerate(zip(prompts, views, strict=True)):
        drive.submit(n, prompt, max_tokens=150, own_view=view)
    run(drive)
    assert drive.scheduler.stats().preemptions_total > 0
    for n, (prompt, view) in enumerate(zip(prompts, views, strict=True)):
        assert drive.outputs[n] == fake_output(prompt, 150, view=view)


def test_no_queue_refuses_no_prompt_that_fits_in_both_groups(make_drive: MakeDrive) -> None:
    drive = drive_of(make_drive, 60, 2 * MOST_WINDOWED, max_queue=0)
    assert drive.submit(0, text(400), max_tokens=2) is None
    # The windowed group has room for one more, the other has none.
    refused = drive.submit(1, text(400), max_tokens=2)
    assert refused is not None
    assert "no room now" in refused.message
    run(drive)
    drive = drive_of(make_drive, 400, MOST_WINDOWED, max_queue=0)
    assert drive.submit(0, text(100), max_tokens=2) is None
    assert drive.submit(1, text(100), max_tokens=2) is not None


def test_a_windowed_group_below_the_window_bounds_the_length(make_drive: MakeDrive) -> None:
    drive = drive_of(make_drive, 400, WINDOW // PAGE_SIZE)
    refused = drive.submit(0, text(WINDOW + 1))
    assert refused is not None
    assert f"at most {WINDOW + 1} tokens fit" in refused.message


def test_drafts_find_room_in_both_groups(make_drive: MakeDrive) -> None:
    prompt = text(40)
    whole = [*prompt, *fake_output(prompt, 60)]
    drafter = ScriptedDrafter(lambda known, count: whole[len(known) : len(known) + count])
    drive = drive_of(make_drive, 60, WINDOW // PAGE_SIZE + 2, drafter=drafter)
    drive.submit(0, prompt, max_tokens=60)
    run(drive)
    assert drive.outputs[0] == whole[40:]
    assert sum(accepted for _, _, accepted in drive.drafts) > 0
