"""A prompt's own log-probabilities: each sent once, no matter how steps cut the prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cache.misses import MissReason
from model.fake import fake_logprobs
from model.interface import SamplingParams, TokenLogprobs
from scheduler.messages import FinishReason

MakeDrive = Callable[..., Any]


def asking(max_tokens: int = 2, count: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, prompt_logprobs=count)


def expected(prompt: list[int], count: int = 1) -> list[TokenLogprobs]:
    return [fake_logprobs(prompt[:i], prompt[i], count) for i in range(1, len(prompt))]


@pytest.mark.parametrize("budget", [8, 13, 200])
def test_chunks_tell_what_the_whole_would(make_drive: MakeDrive, budget: int) -> None:
    drive = make_drive(max_num_batched_tokens=budget)
    prompt = list(range(1, 51))
    drive.submit(1, prompt, params=asking())
    drive.run()
    assert drive.scores[1] == expected(prompt)
    assert drive.outputs[1] == drive.expected(prompt, 2)


def test_a_prompt_of_one_token_has_nothing_to_tell(make_drive: MakeDrive) -> None:
    drive = make_drive()
    drive.submit(1, [7], params=asking())
    drive.run()
    assert drive.scores[1] == []
    assert drive.outputs[1] == drive.expected([7], 2)


def test_what_is_cached_is_computed_again_and_cached_for_others(make_drive: MakeDrive) -> None:
    drive = make_drive(max_num_batched_tokens=64)
    prompt = list(range(1, 31))
    for request_id, params in enumerate((asking(), asking(), None)):
        drive.submit(request_id, prompt, params=params)
        drive.run()
    assert drive.scores[0] == drive.scores[1] == expected(prompt)
    assert drive.scores[2] == []
    started = [one for plan in drive.plans for one in drive.started(plan)]
    assert [(cached, why) for _, cached, why in started] == [
        (0, MissReason.LIMITED),
        (0, MissReason.LIMITED),
        (28, MissReason.NEVER),
    ]


def test_it_does_not_wait_for_pages_it_may_not_use(make_drive: MakeDrive) -> None:
    drive = make_drive(max_num_batched_tokens=16)
    prompt = list(range(1, 41))
    drive.submit(1, prompt)
    drive.step()
    drive.submit(2, prompt, params=asking())
    drive.submit(3, prompt)
    drive.step()
    plan = drive.step()
    assert [sequence.request_id for sequence in plan.sequences] == [1, 2], "the third waits"
    drive.run()
    assert drive.scores[2] == expected(prompt)


def test_no_token_wanted_none_told(make_drive: MakeDrive) -> None:
    drive = make_drive(max_num_batched_tokens=8)
    prompt = list(range(1, 31))
    drive.submit(1, prompt, params=asking(max_tokens=0, count=3))
    drive.submit(2, prompt[:3], params=SamplingParams(max_tokens=0))
    drive.run()
    assert drive.outputs == {1: [], 2: []}
    assert drive.scores[1] == expected(prompt, 3)
    assert drive.finished == {1: FinishReason.LENGTH, 2: FinishReason.LENGTH}


def test_a_prompt_that_is_preempted_halfway_goes_on_where_it_was(make_drive: MakeDrive) -> None:
    drive = make_drive(num_pages=12, page_size=4, max_num_seqs=2, max_num_batched_tokens=2)
    drive.submit(1, range(100, 104), max_tokens=40)
    drive.step()
    drive.step()
    prompt = list(range(1, 29))
    drive.submit(2, prompt, params=asking())
    while drive.scheduler.stats().preemptions_total == 0 and 2 not in drive.finished:
        drive.step()
    assert 0 < len(drive.scores[2]) < len(prompt) - 1, "not halfway"
    drive.run()
    assert drive.scores[2] == expected(prompt)
    assert drive.outputs[2] == drive.expected(prompt, 2)


def test_scores_of_a_cancelled_request_are_not_told(make_drive: MakeDrive) -> None:
    drive = make_drive()
    drive.submit(1, range(1, 9), params=asking())
    plan = drive.scheduler.plan()
    drive.scheduler.cancel(1)
    outcome = drive.scheduler.apply(plan, drive.runner.launch(plan.step).wait())
    assert outcome.prompt_logprobs == []
    assert outcome.finished == []
