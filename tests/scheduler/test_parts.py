from __future__ import annotations

import pytest

from model.interface import SamplingParams
from scheduler.messages import GenerateRequest, Submit
from scheduler.pacing import Pacing
from scheduler.queue import WaitingQueue
from scheduler.sequence import TRANSITIONS, InvalidTransitionError, Sequence, State


def _sequence(request_id: int, priority: int = 0) -> Sequence:
    submit = Submit(
        request_id, GenerateRequest((1, 2), SamplingParams(max_tokens=4), priority=priority)
    )
    return Sequence(submit, arrival=request_id, eos_token_ids=(0,), max_model_len=100)


def test_every_move_is_in_the_table_or_raises() -> None:
    for first in (State.RUNNING, State.FINISHED, State.WAITING):
        for second in State:
            sequence = _sequence(7)
            if first is not State.WAITING:
                sequence.move(first, "first")
            if second in TRANSITIONS[first]:
                sequence.move(second, "second")
                assert sequence.state is second
            else:
                with pytest.raises(InvalidTransitionError, match=r"request 7.*submitted"):
                    sequence.move(second, "second")


def test_the_history_in_the_error_is_bounded() -> None:
    sequence = _sequence(1)
    for _ in range(50):
        sequence.move(State.RUNNING, "admitted")
        sequence.move(State.WAITING, "preempted")
    with pytest.raises(InvalidTransitionError) as error:
        sequence.move(State.WAITING, "again")
    assert len(str(error.value)) < 200


def test_queue_order_and_bookkeeping() -> None:
    queue = WaitingQueue()
    sequences = {i: _sequence(i, priority) for i, priority in enumerate([1, 0, 1, 0, -3])}
    for sequence in sequences.values():
        queue.append(sequence)
        queue.check()
    assert [s.request_id for s in queue] == [4, 1, 3, 0, 2]
    queue.remove(sequences[4])
    queue.remove(sequences[1])
    queue.append_first(sequences[1])
    queue.check()
    assert [s.request_id for s in queue] == [1, 3, 0, 2]
    assert len(queue) == 4


def test_pacing_gives_all_where_nobody_decodes() -> None:
    assert Pacing(3.0).prompt_tokens(512, num_decodes=0, num_prompts=0) == 512


def test_pacing_begins_carefully_and_never_below_the_least() -> None:
    pacing = Pacing(3.0)
    assert pacing.prompt_tokens(512, num_decodes=4, num_prompts=0) == 16
    pacing.observe(1.0, num_decodes=0, num_prompt_tokens=10)
    pacing.observe(0.01, num_decodes=4, num_prompt_tokens=0)
    assert pacing.prompt_tokens(512, num_decodes=4, num_prompts=0) == 16
    assert pacing.prompt_tokens(5, num_decodes=4, num_prompts=0) == 5
    pacing.check()


def test_pacing_learns_from_mixed_steps() -> None:
    pacing = Pacing(2.0)
    for _ in range(100):
        pacing.observe(0.010, num_decodes=4, num_prompt_tokens=0)
        pacing.observe(0.015, num_decodes=4, num_prompt_tokens=50)
    assert pacing.decode_s == pytest.approx(0.010)
    assert pacing.token_s == pytest.approx(0.0001)
    assert pacing.prompt_tokens(512, num_decodes=4, num_prompts=0) == pytest.approx(100, abs=1)


def test_a_burst_of_arrivals_need_not_see_decodes_alone_to_get_its_chunks() -> None:
    pacing = Pacing(3.0)
    pacing.observe(0.100, num_decodes=0, num_prompt_tokens=500)
    pacing.observe(0.0232, num_decodes=4, num_prompt_tokens=16)
    assert pacing.decode_s == pytest.approx(0.020)
    assert pacing.prompt_tokens(512, num_decodes=4, num_prompts=0) == pytest.approx(200, abs=1)
    pacing.check()


def test_costs_are_learnt_anew_where_every_step_is_mixed() -> None:
    """Regression: the cost of one stream was assumed with sixty, and prompts crawled for ever."""
    pacing = Pacing(3.0)
    pacing.observe(0.100, num_decodes=0, num_prompt_tokens=500)
    pacing.observe(0.010, num_decodes=1, num_prompt_tokens=0)
    for _ in range(500):
        chunk = pacing.prompt_tokens(512, num_decodes=60, num_prompts=0)
        pacing.observe(0.060 + 0.0005 * chunk, num_decodes=60, num_prompt_tokens=chunk)
        pacing.check()
    assert pacing.decode_s == pytest.approx(0.060, rel=0.1)
    chunk = max(pacing.prompt_tokens(512, num_decodes=60, num_prompts=0), chunk)
    assert chunk == pytest.approx(2 * 0.060 / 0.0005, rel=0.1)


def test_prompts_under_way_count_among_the_decodes_that_bound_a_step() -> None:
    pacing = Pacing(3.0)
    for _ in range(100):
        pacing.observe(0.010, num_decodes=1, num_prompt_tokens=0)
        pacing.observe(0.015, num_decodes=1, num_prompt_tokens=50)
    # A token costs 0.1 ms, and so does one more decode: 20 of them make a step of 12 ms, and three
    # times that is the bound.
    assert pacing.prompt_tokens(512, num_decodes=1, num_prompts=0) == pytest.approx(200, abs=2)
    assert pacing.prompt_tokens(512, num_decodes=1, num_prompts=20) == pytest.approx(260, abs=2)
    assert pacing.prompt_tokens(512, num_decodes=21, num_prompts=0) == pytest.approx(240, abs=2)
    pacing.check()


def test_decodes_that_have_ended_bound_the_step_no_more() -> None:
    pacing = Pacing(3.0)
    for _ in range(100):
        pacing.observe(0.060, num_decodes=41, num_prompt_tokens=0)
        pacing.observe(0.110, num_decodes=41, num_prompt_tokens=50)
    assert pacing.prompt_tokens(512, num_decodes=41, num_prompts=0) == pytest.approx(120, abs=2)
    assert pacing.prompt_tokens(512, num_decodes=1, num_prompts=0) == pytest.approx(40, abs=2)
    pacing.check()


@pytest.mark.parametrize("num_prompt_tokens", [0, 100])
def test_an_hour_asleep_does_not_outweigh_what_was_learnt(num_prompt_tokens: int) -> None:
    pacing = Pacing(3.0)
    for _ in range(10):
        pacing.observe(0.010, num_decodes=4, num_prompt_tokens=0)
        pacing.observe(0.020, num_decodes=4, num_prompt_tokens=100)
    before = pacing.prompt_tokens(10_000, num_decodes=4, num_prompts=0)
    pacing.observe(3600.0, num_decodes=4, num_prompt_tokens=num_prompt_tokens)
    after = pacing.prompt_tokens(10_000, num_decodes=4, num_prompts=0)
    assert before / 2 < after < before * 2


def test_decodes_are_never_said_to_cost_nothing() -> None:
    """Regression: a slow first prompt left nothing for the decodes, and zero allows no prompt."""
    pacing = Pacing(3.0)
    pacing.observe(5.0, num_decodes=0, num_prompt_tokens=100)
    pacing.observe(0.030, num_decodes=4, num_prompt_tokens=16)
    assert pacing.decode_s is None
    pacing.check()
