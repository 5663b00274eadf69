from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from model.interface import SamplingParams
from scheduler.messages import FinishReason, RejectKind

MakeDrive = Callable[..., Any]


def test_one_request_gets_the_models_tokens(make_drive: MakeDrive) -> None:
    drive = make_drive()
    drive.submit(1, range(10), max_tokens=7)
    drive.run()
    assert drive.outputs[1] == drive.expected(range(10), 7)
    assert drive.finished == {1: FinishReason.LENGTH}


def test_a_long_prompt_is_computed_in_chunks_of_the_budget(make_drive: MakeDrive) -> None:
    drive = make_drive(max_num_batched_tokens=16)
    drive.submit(1, range(1, 51), max_tokens=2)
    drive.run()
    assert [plan.num_tokens for plan in drive.plans] == [16, 16, 16, 2, 1]
    assert drive.outputs[1] == drive.expected(range(1, 51), 2)


def test_decodes_come_first_and_prompts_fill_what_is_left(make_drive: MakeDrive) -> None:
    drive = make_drive(max_num_batched_tokens=20)
    drive.submit(1, range(8), max_tokens=20)
    drive.step()
    drive.submit(2, range(100, 160), max_tokens=2)
    plan = drive.step()
    assert plan.step.rows[0].count == 1
    assert plan.num_decodes == 1
    # Nothing was timed yet, so the prompt gets the least chunk and not the whole budget.
    assert plan.num_prompt_tokens == 16
    drive.run()
    assert drive.outputs[1] == drive.expected(range(8), 20)
    assert drive.outputs[2] == drive.expected(range(100, 160), 2)


def test_slow_prompts_shrink_beside_decodes(make_drive: MakeDrive) -> None:
    drive = make_drive(max_num_batched_tokens=256, max_num_seqs=4, max_decode_slowdown=3.0)
    drive.submit(1, range(8), max_tokens=60)
    drive.step(elapsed_s=0.008)
    drive.step(elapsed_s=0.030)
    drive.submit(2, range(100, 300), max_tokens=2)
    # A decode step takes 30 ms, a prompt token 1 ms. Both sequences together will decode in 31 ms:
    # 63 tokens beside the one that decodes now make the step three times as long.
    assert drive.step(elapsed_s=0.093).num_prompt_tokens == pytest.approx(63, abs=1)


def test_shared_prefix_is_computed_once_even_when_all_arrive_together(
    make_drive: MakeDrive,
) -> None:
    drive = make_drive(max_num_batched_tokens=24, max_num_seqs=8)
    system = list(range(1, 41))
    for request_id in range(8):
        drive.submit(request_id, [*system, 50 + request_id, 51, 52], max_tokens=3)
    drive.run()
    for request_id in range(8):
        prompt = [*system, 50 + request_id, 51, 52]
        assert drive.outputs[request_id] == drive.expected(prompt, 3)
    stats = drive.scheduler.stats()
    assert stats.prompt_tokens_computed_total == 43 + 7 * 3
    assert stats.prefix_hits_tokens_total == 7 * 40


def test_the_followers_of_a_cancelled_prompt_go_on_without_it(make_drive: MakeDrive) -> None:
    drive = make_drive(max_num_batched_tokens=8, max_num_seqs=4)
    prompt = list(range(1, 41))
    drive.submit(1, [*prompt, 1])
    drive.submit(2, [*prompt, 2])
    drive.step()
    assert drive.scheduler.stats().num_running == 1
    drive.scheduler.cancel(1)
    drive.run()
    assert drive.outputs[2] == drive.expected([*prompt, 2], 8)


def test_preempted_requests_come_back_and_give_the_same_tokens(make_drive: MakeDrive) -> None:
    drive = make_drive(num_pages=12, page_size=4)
    for request_id in range(6):
        drive.submit(request_id, range(10 * request_id, 10 * request_id + 6), max_tokens=20)
    drive.run()
    for request_id in range(6):
        prompt = range(10 * request_id, 10 * request_id + 6)
        assert drive.outputs[request_id] == drive.expected(prompt, 20)
    assert drive.scheduler.stats().preemptions_total > 0
    cache = drive.cache.stats()
    assert cache.pages_private == cache.pages_leased == 0


def test_the_newest_of_the_least_priority_is_preempted_first(make_drive: MakeDrive) -> None:
    drive = make_drive(num_pages=8, page_size=4, max_num_seqs=3)
    drive.submit(1, range(7), max_tokens=12, priority=0)
    drive.submit(2, range(20, 27), max_tokens=12, priority=5)
    drive.submit(3, range(40, 47), max_tokens=12, priority=0)
    while drive.scheduler.stats().preemptions_total == 0:
        drive.step()
    assert drive.scheduler.stats().num_waiting == 1
    drive.run()
    # The two of priority 0 were let through before the one of priority 5.
    assert list(drive.finished) == [1, 3, 2]


def test_the_newest_gives_way_itself_when_it_is_the_one_to_grow(make_drive: MakeDrive) -> None:
    drive = make_drive(num_pages=4, page_size=4, max_num_seqs=2)
    drive.submit(1, range(1), max_tokens=10)
    drive.submit(2, range(20, 23), max_tokens=10)
    drive.run()
    # The other had room for two more tokens when the second needed its third page.
    assert drive.scheduler.stats().preemptions_total > 0
    assert drive.outputs[1] == drive.expected(range(1), 10)
    assert drive.outputs[2] == drive.expected(range(20, 23), 10)


def test_a_prompt_that_takes_the_whole_budget_leaves_decodes_behind_it_their_token(
    make_drive: MakeDrive,
) -> None:
    drive = make_drive(max_num_batched_tokens=8, max_num_seqs=2)
    drive.submit(1, range(5), max_tokens=12, priority=9)
    drive.step()
    drive.submit(2, range(20, 60), max_tokens=2, priority=0)
    drive.step()
    assert [row.count for row in drive.step().step.rows] == [1, 7]
    drive.run()
    assert drive.outputs[1] == drive.expected(range(5), 12)
    assert drive.outputs[2] == drive.expected(range(20, 60), 2)


def test_smaller_priority_goes_first(make_drive: MakeDrive) -> None:
    drive = make_drive(max_num_seqs=1, max_num_batched_tokens=32)
    for request_id, priority in enumerate([5, 0, 0, -1]):
        drive.submit(request_id, range(10 * request_id, 10 * request_id + 5), priority=priority)
    drive.run()
    assert list(drive.finished) == [3, 1, 2, 0]


@pytest.mark.parametrize("num_tokens", [33, 200])
def test_a_prompt_that_can_never_fit_is_refused_at_once(
    make_drive: MakeDrive, num_tokens: int
) -> None:
    """Regression: a peer dropped an over-long prompt without an answer."""
    drive = make_drive(num_pages=8, page_size=4)
    rejected = drive.submit(1, range(num_tokens))
    assert rejected is not None
    assert rejected.kind is RejectKind.INVALID
    assert rejected.param == "prompt"
    assert str(num_tokens) in rejected.message
    assert not drive.scheduler.has_work


def test_the_longest_prompt_that_fits_is_served(make_drive: MakeDrive) -> None:
    drive = make_drive(num_pages=8, page_size=4)
    assert drive.submit(1, range(32), max_tokens=50) is None
    drive.run()
    assert drive.outputs[1] == drive.expected(range(32), 1)
    assert drive.finished == {1: FinishReason.LENGTH}


def test_a_request_alone_may_fill_the_pool(make_drive: MakeDrive) -> None:
    drive = make_drive(num_pages=8, page_size=4)
    drive.submit(1, range(5), max_tokens=200)
    drive.run()
    assert drive.outputs[1] == drive.expected(range(5), 28)


@pytest.mark.parametrize(
    ("prompt", "param"), [((), "prompt"), (range(300), "prompt")], ids=["empty", "too long"]
)
def test_bad_prompts_are_refused(make_drive: MakeDrive, prompt: Any, param: str) -> None:
    rejected = make_drive().submit(1, prompt)
    assert rejected.kind is RejectKind.INVALID
    assert rejected.param == param


def test_an_id_in_use_is_refused_and_its_owner_unharmed(make_drive: MakeDrive) -> None:
    drive = make_drive()
    drive.submit(1, range(5))
    assert drive.submit(1, range(9)).param == "request_id"
    drive.run()
    assert drive.outputs[1] == drive.expected(range(5), 8)


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_cancel_gives_pages_back_at_once(make_drive: MakeDrive, num_steps: int) -> None:
    drive = make_drive(max_num_batched_tokens=8)
    drive.submit(1, range(20), max_tokens=30)
    for _ in range(num_steps):
        drive.step()
    drive.scheduler.cancel(1)
    drive.scheduler.cancel(1)
    assert not drive.scheduler.has_work
    assert drive.cache.stats().pages_private == drive.cache.stats().pages_leased == 0
    drive.scheduler.check()


def test_cancel_and_failure_while_the_step_is_in_flight(make_drive: MakeDrive) -> None:
    drive = make_drive()
    drive.submit(1, range(5))
    drive.submit(2, range(20, 25))
    plan = drive.scheduler.plan()
    drive.scheduler.cancel(1)
    outcome = drive.scheduler.apply(plan, drive.runner.launch(plan.step).wait())
    assert outcome.request_ids == [2]
    plan = drive.scheduler.plan()
    drive.scheduler.cancel(2)
    drive.scheduler.fail(plan, "it failed")
    drive.scheduler.check()
    assert not drive.scheduler.has_work


def test_stop_tokens_end_a_request_but_not_before_min_tokens(make_drive: MakeDrive) -> None:
    drive = make_drive()
    expected = drive.expected(range(5), 8)
    stop = expected[3]
    assert stop not in expected[:3]
    params = SamplingParams(max_tokens=8, ignore_eos=True, stop_token_ids=(stop,))
    drive.submit(1, range(5), params=params)
    late = SamplingParams(max_tokens=8, min_tokens=6, ignore_eos=True, stop_token_ids=(stop,))
    drive.submit(2, range(5), params=late)
    drive.run()
    assert drive.outputs[1] == expected[:4]
    assert drive.finished[1] is FinishReason.STOP
    # The model here does not know of the ban, so the token itself comes and must be passed over.
    assert len(drive.outputs[2]) == 8


def test_end_of_sequence_ends_a_request(make_drive: MakeDrive) -> None:
    drive = make_drive()
    for first in range(40):
        drive.submit(first, [first, first, 3], params=SamplingParams(max_tokens=100))
    drive.run()
    ended = [i for i, reason in drive.finished.items() if reason is FinishReason.STOP]
    assert ended
    assert all(drive.outputs[request_id][-1] == 0 for request_id in ended)


def test_a_resumed_request_goes_on_where_it_was(make_drive: MakeDrive) -> None:
    drive = make_drive()
    expected = drive.expected(range(6), 10)
    drive.submit(1, range(6), max_tokens=10, output_token_ids=tuple(expected[:4]))
    drive.run()
    assert drive.outputs[1] == expected[4:]


def test_a_long_queue_for_one_prefix_is_not_searched_whole_in_each_step(
    make_drive: MakeDrive, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive = make_drive(num_pages=256, max_num_batched_tokens=64)
    prefix = list(range(1, 41))
    for request_id in range(200):
        drive.submit(request_id, [*prefix, 50, request_id], max_tokens=2)
    searches, match = [0], drive.cache.match

    def counted(*args: Any) -> Any:
        searches[-1] += 1
        return match(*args)

    monkeypatch.setattr(drive.cache, "match", counted)
    while drive.scheduler.has_work:
        drive.step()
        searches.append(0)
    assert max(searches) <= 8 + 32
    assert drive.scheduler.stats().prefix_hits_tokens_total >= 199 * 40


def test_namespaces_share_nothing(make_drive: MakeDrive) -> None:
    drive = make_drive()
    for request_id, namespace in enumerate(["", "a", "b", "a"]):
        drive.submit(request_id, range(20), namespace=namespace, max_tokens=2)
        drive.run()
    assert drive.scheduler.stats().prefix_hits_tokens_total == 19


def test_same_inputs_same_plans(make_drive: MakeDrive) -> None:
    def plans() -> list[Any]:
        drive = make_drive(num_pages=12)
        for request_id in range(7):
            drive.submit(request_id, range(request_id % 3, request_id % 3 + 9), max_tokens=20)
        drive.run()
        return [(p.step.rows, p.step.page_ids) for p in drive.plans]

    assert plans() == plans()
