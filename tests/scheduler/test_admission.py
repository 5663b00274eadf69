"""Admission refuses requests that would have to wait while too many wait already."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from configs.schema import SchedulerSection
from model.interface import SamplingParams
from scheduler.admission import Room, place_for
from scheduler.messages import GenerateRequest, Rejected, RejectKind, Submit
from scheduler.queue import WaitingQueue
from scheduler.sequence import Sequence
from scheduler.suspects import new_probe

MakeDrive = Callable[..., Any]


@pytest.fixture
def full(make_drive: MakeDrive) -> MakeDrive:
    """A scheduler whose one slot is taken by request 0 for a while."""

    def make(**config: Any) -> Any:
        drive = make_drive(max_num_seqs=1, **config)
        assert drive.submit(0, range(5), max_tokens=4) is None
        drive.step()
        return drive

    return make


def test_a_full_queue_says_so(full: MakeDrive) -> None:
    drive = full(max_queue=2)
    for request_id in (1, 2):
        assert drive.submit(request_id, range(5)) is None
    refused = drive.submit(3, range(5))
    assert refused.kind is RejectKind.BUSY
    assert "2 requests are waiting" in refused.message
    drive.run()
    assert drive.submit(4, range(5)) is None
    drive.run()


def test_a_burst_that_can_start_at_once_is_no_queue(make_drive: MakeDrive) -> None:
    """It arrives between two steps, so all of it stands in the queue for a moment."""
    drive = make_drive(max_queue=1, max_queue_tokens=5)
    for request_id in range(8):
        assert drive.submit(request_id, range(request_id, request_id + 3)) is None
    drive.step()
    assert drive.scheduler.stats().num_running == 8


def test_without_a_queue_only_those_run_that_can_start(full: MakeDrive) -> None:
    drive = full(max_queue=0)
    assert "no queue" in drive.submit(1, range(5)).message
    drive.run()
    assert drive.submit(2, range(5)) is None
    drive.run()
    assert drive.outputs[2] == drive.expected(range(5), 8)


def test_a_queue_full_of_tokens_says_so(full: MakeDrive) -> None:
    drive = full(max_queue_tokens=30)
    assert drive.submit(1, range(20)) is None
    assert drive.submit(2, range(10)) is None
    assert drive.scheduler.stats().num_waiting_tokens == 30
    refused = drive.submit(3, range(1))
    assert refused.kind is RejectKind.BUSY
    assert "30" in refused.message
    drive.scheduler.cancel(1)
    assert drive.submit(4, range(20)) is None
    drive.run()
    assert drive.scheduler.stats().num_waiting_tokens == 0
    assert set(drive.finished) == {0, 2, 4}


def test_an_empty_queue_takes_a_prompt_longer_than_its_limit(full: MakeDrive) -> None:
    drive = full(max_queue_tokens=4)
    assert drive.submit(1, range(20)) is None
    assert drive.submit(2, range(1)).kind is RejectKind.BUSY
    drive.run()
    assert 1 in drive.finished


def test_a_full_queue_does_not_refuse_what_another_engine_had_taken_in(
    make_drive: MakeDrive,
) -> None:
    """Regression: after a crash running requests filled the queue, and waiting ones got a 429."""
    drive = make_drive(max_queue=1, max_num_seqs=1)
    for request_id in range(3):
        assert drive.submit(request_id, range(request_id, 5), is_resumed=True) is None
    assert drive.submit(3, range(5)).kind is RejectKind.BUSY
    drive.run()
    assert len(drive.finished) == 3


def test_a_burst_into_an_idle_engine_starts_whole_or_is_refused(make_drive: MakeDrive) -> None:
    """Without a queue no admitted request waits, no matter which prefixes are cached."""
    chance = random.Random(7)
    drive = make_drive(num_pages=24, max_queue=0, max_num_batched_tokens=512)
    num_refused = num_started = 0
    for first_id in range(0, 400, 10):
        taken = []
        for request_id in range(first_id, first_id + chance.randrange(1, 10)):
            prompt = [chance.randrange(60) for _ in range(chance.randrange(1, 30))]
            if drive.submit(request_id, prompt) is None:
                taken.append(request_id)
            else:
                num_refused += 1
        assert [request_id for request_id, _ in drive.step().started] == taken
        num_started += len(taken)
        drive.run()
    assert num_refused > 40
    assert num_started > 40


def test_a_full_queue_gives_a_higher_priority_the_place_of_the_last(full: MakeDrive) -> None:
    drive = full(max_queue=3)
    for request_id, priority in ((1, 5), (2, 9), (3, 5)):
        assert drive.submit(request_id, range(5), priority=priority) is None
    assert drive.scheduler.stats().lowest_waiting_priority == 9
    for request_id, priority, gone in ((4, 0, 2), (5, 0, 3), (6, -1, 1), (7, -2, 5)):
        assert drive.submit(request_id, range(5), priority=priority) is None
        assert drive.displaced.pop() == gone, "the newest of the lowest priority"
    assert drive.scheduler.stats().lowest_waiting_priority == 0
    assert drive.submit(8, range(5), priority=0).kind is RejectKind.BUSY, "one of its own waits"
    assert drive.submit(9, range(5), priority=1).kind is RejectKind.BUSY
    drive.run()
    assert set(drive.finished) == {0, 4, 6, 7}
    assert not drive.displaced


def test_the_displaced_are_as_few_as_make_room_in_tokens(full: MakeDrive) -> None:
    drive = full(max_queue_tokens=30)
    for request_id in (1, 2, 3):
        assert drive.submit(request_id, range(10), priority=1) is None
    assert drive.submit(4, range(15)) is None
    assert drive.displaced == [3, 2]
    assert drive.submit(5, range(16)).kind is RejectKind.BUSY, "10 tokens are not enough"
    assert drive.displaced == [3, 2]
    assert drive.scheduler.stats().num_waiting == 2


def test_a_queue_beyond_its_limit_gives_a_higher_priority_a_place_too(
    make_drive: MakeDrive,
) -> None:
    """Regression: a preempted sequence made the queue too long for one that leaves to be enough."""
    drive = make_drive(num_pages=6, max_num_seqs=2, max_queue=1)
    assert drive.submit(0, range(8), max_tokens=12) is None
    assert drive.submit(1, range(10, 18), max_tokens=12, priority=1) is None
    drive.step()
    assert drive.submit(2, range(5), priority=1) is None
    while drive.scheduler.stats().num_waiting < 2:
        drive.step()
    assert drive.submit(3, range(5), priority=1).kind is RejectKind.BUSY
    assert drive.submit(4, range(5)) is None
    assert drive.displaced == [2]
    assert drive.scheduler.stats().num_waiting == 2
    assert drive.submit(5, range(5)).kind is RejectKind.BUSY, "none is left that may leave"
    drive.run()
    assert set(drive.finished) == {0, 1, 4}


def test_who_has_begun_is_not_displaced(make_drive: MakeDrive) -> None:
    """One was preempted; another engine had given tokens, or a prompt's scores, to the others."""
    drive = make_drive(num_pages=6, max_num_seqs=2, max_queue=3)
    assert drive.submit(0, range(8), max_tokens=12) is None
    assert drive.submit(1, range(10, 18), max_tokens=12, priority=9) is None
    drive.step()
    assert drive.scheduler.stats().num_running == 2
    while drive.scheduler.stats().num_waiting == 0:
        drive.step()
    scored = SamplingParams(max_tokens=2, ignore_eos=True, prompt_logprobs=0)
    resumed = {"is_resumed": True, "priority": 9}
    assert drive.submit(2, range(5), output_token_ids=(1,), **resumed) is None
    assert drive.submit(3, range(5), params=scored, num_scored=2, **resumed) is None
    assert drive.submit(4, range(5)).kind is RejectKind.BUSY
    assert drive.submit(5, range(5), **resumed) is None
    drive.scheduler.cancel(2)
    drive.scheduler.cancel(3)
    assert drive.submit(6, range(5)) is None
    assert drive.submit(7, range(5)) is None
    assert drive.displaced == [5], "taken in by another engine, which had not begun with it"
    drive.run()
    assert set(drive.finished) == {0, 1, 6, 7}


@pytest.mark.parametrize(
    ("num_sequences", "num_tokens", "is_enough"),
    [(1, 16, True), (1, 17, False), (2, 2, True), (2, 9, True), (2, 10, False), (3, 3, False)],
)
def test_room_counts_the_worst_way_tokens_fall_into_pages(
    num_sequences: int, num_tokens: int, is_enough: bool
) -> None:
    room = Room(num_free_slots=2, num_free_pages=4, page_size=4, max_held_tokens=1000)
    assert room.is_enough(num_sequences, num_tokens) is is_enough


@pytest.mark.parametrize("priority", [0, -1])
def test_a_waiting_probe_neither_counts_nor_leaves(priority: int) -> None:
    waiting, probe, config = WaitingQueue(), new_probe(), SchedulerSection(max_queue=2)
    lowest = Sequence(_submit(1, priority=1), arrival=1, eos_token_ids=(), max_model_len=9)
    waiting.append(probe)
    waiting.append(lowest)
    room = Room(0, 0, 4, 0)
    assert place_for(_submit(2, priority=priority), waiting, room, config, probe) == []
    waiting.append(Sequence(_submit(2), arrival=2, eos_token_ids=(), max_model_len=9))
    assert place_for(_submit(3, priority=priority), waiting, room, config, probe) == [lowest]
    waiting.remove(lowest)
    config = SchedulerSection(max_queue=1)
    found = place_for(_submit(3), waiting, room, config, probe)
    assert isinstance(found, Rejected)


def _submit(request_id: int, *, priority: int = 0) -> Submit:
    params = SamplingParams(max_tokens=1)
    return Submit(request_id, GenerateRequest((1, 2), params, priority=priority))
