"""Cached pages outlast eviction and restarts, and no answer depends on them.

The model of these tests reads back every key in view at each step: a page with other contents fails
there (`model/fake.py`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from cache.view import View
from model.fake import Fault, FaultKind
from model.interface import Vocabulary
from scheduler.messages import FinishReason, Loaded, ResetCache, SetVocabulary
from waiting import TIMEOUT_S

MakeTier = Callable[..., Any]

CHAT = list(range(100, 141))
OTHER = list(range(200, 241))


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "octavo-kv").glob("segment-*.kv"))


# ---- warm from the disk --------------------------------------------------------------------------


def test_a_restart_is_warm(make_tier: MakeTier) -> None:
    drive = make_tier()
    assert drive.ask(1, CHAT) == 0
    drive.settle()
    assert drive.tier.disk_stored_pages_total == 10
    drive = make_tier()
    assert drive.ask(2, CHAT) == 40
    assert drive.tier.disk_loaded_pages_total == 10
    assert drive.ask(3, CHAT) == 40
    assert drive.tier.disk_loaded_pages_total == 10
    assert drive.tier.disk_pages == 10


def test_an_end_stores_what_is_left(make_tier: MakeTier) -> None:
    make_tier().ask(1, CHAT)
    assert make_tier().ask(2, [*CHAT, 7, 8, 9]) == 40


def test_evicted_pages_come_back(make_tier: MakeTier) -> None:
    drive = make_tier(num_pages=16)
    drive.ask(1, CHAT)
    drive.settle()
    drive.ask(2, OTHER)
    assert drive.engine.cache.match(CHAT).num_tokens <= 20
    assert drive.ask(3, CHAT) == 40


def test_a_part_of_the_prompt_is_loaded_behind_cached_pages(make_tier: MakeTier) -> None:
    drive = make_tier()
    drive.ask(1, CHAT)
    drive = make_tier()
    drive.ask(2, [*CHAT[:18], 5])
    assert drive.tier.disk_loaded_pages_total == 4
    assert drive.ask(3, CHAT[:33]) == 32
    assert drive.tier.disk_loaded_pages_total == 8


def test_a_resumed_request_is_warm_with_its_output(make_tier: MakeTier) -> None:
    drive = make_tier()
    output = drive.expected(CHAT, 8)
    # The next turn finds the pages with the answer, so they are stored.
    drive.ask(1, [*CHAT, *output[:7]])
    drive = make_tier()
    drive.submit(2, CHAT, max_tokens=8, output_token_ids=tuple(output[:4]))
    drive.run()
    assert drive.started[2].cached_tokens == 44
    assert drive.outputs[2] == output[4:]


def test_long_prompts_are_stored_as_far_as_they_are_found_again(make_tier: MakeTier) -> None:
    long = [number % 61 + 1 for number in range(280)]
    how = {"num_pages": 256, "fake": {"max_model_len": 512}}
    drive = make_tier(**how)
    drive.ask(1, long)
    drive.settle()
    assert drive.tier.disk_pages == 64
    drive.ask(2, [*long[:272], 3, 4])
    drive.settle()
    assert drive.tier.disk_pages == 68
    drive = make_tier(**how)
    assert drive.ask(3, long) == 272


def test_found_pages_are_stored_between_steps(make_tier: MakeTier) -> None:
    drive = make_tier()
    drive.ask(1, CHAT)
    drive.ask(2, CHAT, max_tokens=20)
    drive.flush()
    assert drive.tier.disk_stored_pages_total == 10


def test_namespaces_are_kept_apart(make_tier: MakeTier) -> None:
    make_tier().ask(1, CHAT, namespace="a")
    drive = make_tier()
    assert drive.ask(2, CHAT, namespace="b") == 0
    assert drive.ask(3, CHAT, namespace="a") == 40


# ---- requests that wait --------------------------------------------------------------------------


def test_a_request_waits_without_work_while_others_run(make_tier: MakeTier) -> None:
    make_tier().ask(1, CHAT)
    drive = make_tier()
    drive.store.gate.clear()
    drive.submit(2, CHAT)
    assert not drive.tiered.has_work
    assert drive.tiered.stats().num_waiting == 1
    drive.submit(3, OTHER)
    while 3 not in drive.finished:
        drive.step()
    assert 2 not in drive.started
    drive.now_s = 2.0
    drive.store.gate.set()
    drive.run()
    assert drive.started[2].cached_tokens == 40
    assert drive.started[2].queue_s == 2.0
    assert drive.started[3].queue_s == 0.0
    assert drive.tiered.stats().num_waiting == 0


def test_requests_with_one_prefix_share_a_load(make_tier: MakeTier) -> None:
    drive = make_tier()
    drive.ask(1, CHAT)
    drive.ask(2, [*CHAT[:32], *OTHER[:9]])
    drive = make_tier()
    drive.store.gate.clear()
    drive.submit(3, CHAT[:34])
    drive.submit(4, CHAT)
    drive.submit(5, [*CHAT[:32], *OTHER[:9]])
    drive.submit(6, CHAT)
    assert drive.tiered.stats().num_preparing == 4
    drive.cancel(6)
    assert drive.tiered.stats().num_preparing == 3
    drive.store.gate.set()
    drive.run()
    # The two longer ones have two pages of their own.
    assert drive.tier.disk_loaded_pages_total == drive.store.num_reads == 8 + 2 + 2
    assert [drive.started[id_].cached_tokens // 4 for id_ in (3, 4, 5)] == [8, 10, 10]
    assert 6 not in drive.started


def test_a_cancelled_load_leaves_the_others_waiting_for_it(make_tier: MakeTier) -> None:
    make_tier().ask(1, CHAT)
    drive = make_tier()
    drive.store.gate.clear()
    drive.submit(2, CHAT)
    drive.submit(3, CHAT)
    drive.cancel(2)
    drive.cancel(99)
    assert drive.tiered.stats().num_preparing == 1
    drive.store.gate.set()
    drive.run()
    assert drive.started.keys() == {3}
    assert drive.started[3].cached_tokens == 40
    assert drive.outputs[3] == drive.expected(CHAT, 4)


def test_pages_that_were_computed_meanwhile_are_left_as_they_are(make_tier: MakeTier) -> None:
    make_tier().ask(1, CHAT)
    drive = make_tier()
    drive.store.gate.clear()
    drive.submit(2, CHAT)
    drive.submit(3, CHAT, params={"prompt_logprobs": 0})
    while 3 not in drive.finished:
        drive.step()
    drive.store.gate.set()
    drive.run()
    assert drive.started[2].cached_tokens == 40
    assert drive.tier.disk_loaded_pages_total == 0


def test_an_end_waits_for_no_load(make_tier: MakeTier) -> None:
    make_tier().ask(1, CHAT)
    drive = make_tier()
    drive.store.gate.clear()
    drive.submit(2, CHAT)
    drive.tiered._loads.close()
    drive.tiered._loads.check()
    assert drive.tier.disk_late_loads_total == 0


def test_a_late_load_is_given_up(make_tier: MakeTier) -> None:
    make_tier().ask(1, CHAT)
    drive = make_tier()
    drive.store.gate.clear()
    drive.submit(2, CHAT)
    drive.now_s = 4.9
    drive.tiered.handle(Loaded(2))
    assert not drive.tiered.has_work
    drive.now_s = 5.0
    drive.tiered.handle(Loaded(2))
    drive.run()
    assert drive.started[2].cached_tokens == 0
    assert drive.outputs[2] == drive.expected(CHAT, 4)
    assert drive.tier.disk_late_loads_total == 1
    assert drive.tier.disk_load_us_total == 5_000_000
    drive.store.gate.set()
    # Messages of the threads that come later are of no consequence.
    drive.tiered.handle(Loaded(2))
    drive.take_messages()


def test_what_was_read_before_the_deadline_is_used(make_tier: MakeTier) -> None:
    prompt = [number % 61 + 1 for number in range(200)]
    make_tier().ask(1, prompt)
    drive = make_tier()
    drive.submit(2, prompt)
    while not drive.engine.cache.stats().pages_cached:
        # Runs may become ready in any order.
        drive.tiered.handle(drive.inbox.get(timeout=TIMEOUT_S))
    assert drive.engine.cache.stats().pages_cached < 50
    drive.store.gate.clear()
    drive.now_s = 5.0
    drive.tiered.handle(Loaded(2))
    drive.run()
    assert drive.started[2].cached_tokens > 0
    assert drive.outputs[2] == drive.expected(prompt, 4)


def test_loads_that_do_not_pay_are_refused(make_tier: MakeTier) -> None:
    make_tier().ask(1, CHAT)
    drive = make_tier()
    drive.store.gate.clear()
    drive.submit(2, CHAT)
    drive.now_s = 3.0
    drive.store.gate.set()
    drive.run()
    drive.engine.cache.reset()
    drive.engine._scheduler.pacing.observe(0.01, num_decodes=0, num_prompt_tokens=10)
    drive.flush()
    assert drive.ask(3, CHAT) == 0
    assert drive.tier.disk_refused_pages_total == 10


def test_requests_that_cannot_use_pages_do_not_wait(make_tier: MakeTier) -> None:
    drive = make_tier()
    drive.ask(1, CHAT)
    drive.ask(2, CHAT)
    drive = make_tier()
    drive.submit(3, CHAT, params={"prompt_logprobs": 0})
    drive.submit(4, CHAT, view=View(4, 8))
    drive.submit(5, CHAT[:3])
    drive.submit(6, [])
    drive.submit(7, list(range(256)))
    drive.run()
    assert drive.store.num_reads == 0
    assert drive.rejected.keys() == {6, 7}
    assert drive.finished.keys() == {3, 4, 5}


def test_a_page_that_is_being_computed_is_not_read(make_tier: MakeTier) -> None:
    make_tier().ask(1, CHAT)
    drive = make_tier()
    drive.submit(2, CHAT, params={"prompt_logprobs": 0})
    drive.step()
    drive.submit(3, CHAT)
    drive.run()
    assert drive.store.num_reads == 0
    assert drive.started[3].cached_tokens == 40


def test_a_full_pool_takes_as_many_pages_as_fit(make_tier: MakeTier) -> None:
    make_tier().ask(1, CHAT)
    drive = make_tier(num_pages=16)
    drive.submit(2, OTHER[:37], max_tokens=20)
    drive.step()
    drive.submit(3, CHAT)
    drive.tiered.handle(drive.inbox.get(timeout=TIMEOUT_S))
    assert drive.tier.disk_loaded_pages_total == 6
    drive.run()
    assert drive.finished[3] is FinishReason.LENGTH
    assert drive.outputs[3] == drive.expected(CHAT, 4)


# ---- faults --------------------------------------------------------------------------------------


def test_a_damaged_page_is_computed(make_tier: MakeTier, tmp_path: Path) -> None:
    drive = make_tier()
    drive.ask(1, CHAT)
    drive.close()
    [path] = segments(tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 10 - 30] ^= 1
    path.write_bytes(content)
    drive = make_tier()
    assert drive.ask(2, CHAT) == 8
    assert drive.tier.disk_corrupt_pages_total == 1
    # The next time it is stored anew.
    drive.settle()
    drive = make_tier()
    assert drive.ask(3, CHAT) == 40


def test_after_a_fault_the_pages_of_its_requests_are_deleted(make_tier: MakeTier) -> None:
    drive = make_tier()
    drive.ask(1, CHAT)
    drive.ask(2, OTHER)
    faults = {7: Fault(FaultKind.NOT_FINITE, 40)}
    drive = make_tier(fake={"faults": faults})
    drive.submit(3, CHAT, params={"seed": 7})
    drive.run()
    assert 3 in drive.failed
    drive.flush()
    assert drive.tier.disk_pages == 10
    assert drive.ask(4, OTHER) == 40


def test_a_reset_clears_the_disk(make_tier: MakeTier) -> None:
    drive = make_tier()
    drive.ask(1, CHAT)
    drive.settle()
    drive.ask(2, OTHER)
    drive.tiered.handle(ResetCache())
    drive.step()
    assert drive.answers == [22]
    drive.settle()
    assert drive.tier.disk_bytes == drive.tier.disk_pages == 0
    assert drive.ask(3, CHAT) == 0


def test_pages_that_were_evicted_before_they_were_stored_are_counted(make_tier: MakeTier) -> None:
    drive = make_tier(num_pages=11)
    drive.ask(1, CHAT)
    drive.ask(2, OTHER)
    drive.settle()
    assert drive.tier.disk_dropped_pages_total == 10
    assert drive.tier.disk_stored_pages_total == 10


def test_storing_stops_when_its_time_is_over(make_tier: MakeTier) -> None:
    drive = make_tier()
    drive.ask(1, CHAT)
    ticks = count()
    drive.tiered._stores._clock_s = lambda: next(ticks) * 0.002
    assert drive.tiered.idle()
    drive.flush()
    assert 0 < drive.tier.disk_stored_pages_total < 10
    drive.settle()
    assert drive.tier.disk_stored_pages_total == 10


def test_storing_goes_on_where_a_full_queue_ended_it(make_tier: MakeTier) -> None:
    drive = make_tier()
    drive.ask(1, CHAT)
    room, num_taken = drive.tiered._writer._room, 0
    while room.acquire(blocking=False):
        num_taken += 1
    assert drive.tiered.idle()
    drive.ask(2, CHAT, max_tokens=20)
    assert drive.tier.disk_stored_pages_total == 0
    for _ in range(num_taken):
        room.release()
    drive.settle()
    assert drive.tier.disk_stored_pages_total == 10


def test_of_many_prompts_that_wait_to_be_stored_the_oldest_are_dropped(make_tier: MakeTier) -> None:
    drive = make_tier()
    drive.ask(1, CHAT)
    [job] = drive.tiered._stores._unfound
    for _ in range(256):
        drive.tiered._stores.add_computed(job.prompt)
    assert drive.tier.disk_dropped_pages_total == 10


def test_other_messages_reach_the_engine(make_tier: MakeTier) -> None:
    drive = make_tier()
    drive.tiered.handle(SetVocabulary(Vocabulary(b"ab", array("I", [1, 2]), (), (0,))))
    assert drive.tiered.idle() is False
