"""Waiting requests are looked up again only where the answer may have changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cache.radix import RadixTree
from cache.view import View

MakeDrive = Callable[..., Any]


@pytest.fixture
def num_searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The searches of the tree by the plans, with one entry that a test may set to zero."""
    count, find = [0], RadixTree.find

    def counted(*args: Any) -> Any:
        count[0] += 1
        return find(*args)

    monkeypatch.setattr(RadixTree, "find", counted)
    return count


def _plan_and_apply(drive: Any, num_searches: list[int]) -> int:
    """Compute one step and return the searches of it, without those of `check`."""
    before = num_searches[0]
    plan = drive.scheduler.plan()
    searches = num_searches[0] - before
    outcome = drive.scheduler.apply(plan, drive.runner.launch(plan.step).wait())
    drive.finished.update(outcome.finished)
    drive.scheduler.check()
    return searches


def test_a_blocked_request_is_not_searched_for_at_each_step(
    make_drive: MakeDrive, num_searches: list[int]
) -> None:
    drive = make_drive(num_pages=16, max_num_seqs=4, max_num_batched_tokens=64)
    drive.submit(1, range(40), max_tokens=20)
    drive.step()
    drive.submit(2, range(100, 140), max_tokens=2)
    for _ in range(2):
        _plan_and_apply(drive, num_searches)
    assert drive.scheduler.stats().num_waiting == 1
    searches = []
    while 1 not in drive.finished:
        searches.append(_plan_and_apply(drive, num_searches))
    assert len(searches) > 10
    assert sum(searches) == 0
    drive.run()
    assert set(drive.finished) == {1, 2}


def test_requests_held_back_are_searched_for_once(
    make_drive: MakeDrive, num_searches: list[int]
) -> None:
    """Steps are planned here while the step that computes the prefix is under way."""
    drive = make_drive(num_pages=256, max_num_seqs=32, max_num_batched_tokens=128)
    prefix = list(range(1, 101))
    for request_id in range(20):
        drive.submit(request_id, [*prefix, 200, request_id], max_tokens=2)
    first = drive.scheduler.plan()
    # A match and an admission for the first; then a match for each of the others.
    assert num_searches[0] == 2 + 19
    drive.submit(20, [300], max_tokens=2)
    second = drive.scheduler.plan()
    assert [sequence.request_id for sequence in second.sequences] == [0, 20]
    assert num_searches[0] == 2 + 19 + 2
    for plan in (first, second):
        drive.scheduler.apply(plan, drive.runner.launch(plan.step).wait())
    drive.scheduler.check()
    drive.run()
    assert drive.scheduler.stats().prefix_hits_tokens_total >= 19 * 100


def test_a_cancelled_request_makes_room_for_the_blocked_one_at_once(
    make_drive: MakeDrive,
) -> None:
    drive = make_drive(num_pages=24, max_num_seqs=4, max_num_batched_tokens=64)
    drive.submit(1, range(40), max_tokens=20)
    drive.submit(2, range(50, 70), max_tokens=20)
    drive.step()
    drive.submit(3, range(100, 140), max_tokens=2)
    for _ in range(3):
        drive.step()
    assert drive.scheduler.stats().num_waiting == 1
    drive.scheduler.cancel(2)
    drive.step()
    assert drive.scheduler.stats().num_waiting == 0
    drive.run()


def test_a_page_that_another_enters_is_found_by_the_blocked_request(make_drive: MakeDrive) -> None:
    """The first computes, as its answer, just the page that the second one needs."""
    drive = make_drive(num_pages=14, max_num_seqs=4, max_num_batched_tokens=64)
    answer = drive.expected(range(40), 8)
    drive.submit(1, range(40), max_tokens=8)
    drive.step()
    drive.submit(2, [*range(40), *answer[:4], *range(200, 206)], max_tokens=1)
    drive.run()
    assert drive.outputs[2] == drive.expected([*range(40), *answer[:4], *range(200, 206)], 1)


@pytest.mark.parametrize("view", [View(0, 8), View(4, 12)])
def test_under_a_window_nothing_blocked_is_remembered(make_drive: MakeDrive, view: View) -> None:
    drive = make_drive(num_pages=6, view=view, max_num_seqs=4, max_num_batched_tokens=8)
    for request_id in range(6):
        drive.submit(request_id, range(request_id, request_id + 30), max_tokens=6)
    drive.run()
    assert len(drive.finished) == 6
