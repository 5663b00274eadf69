"""Requests that arrive together, with steps that take the time a CPU's would.

The costs are those of a model of 135 M parameters in bf16 on two Zen 4 cores. They are in
docs/performance.md. A step reads all weights, and each token and each decode adds its part.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from cache.kv_cache import KVCache
from configs.schema import SchedulerSection
from model.fake import FakeRunner
from model.interface import SamplingParams, StepOutput
from scheduler.messages import GenerateRequest, Submit
from scheduler.scheduler import Scheduler

_STEP_S, _TOKEN_S, _DECODE_S = 0.008, 0.0005, 0.0003
_PROMPT_TOKENS = 129


def _step_s(num_decodes: int, num_prompt_tokens: int = 0) -> float:
    return _STEP_S + _TOKEN_S * (num_decodes + num_prompt_tokens) + _DECODE_S * num_decodes


@dataclass
class Timed:
    """A scheduler whose steps take their time on a clock of its own."""

    max_num_seqs: int = 64
    max_decode_slowdown: float = 3.0
    now_s: float = 0.0
    #: When each token of each request came.
    tokens_s: dict[int, list[float]] = field(default_factory=dict)
    steps_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        runner = FakeRunner(page_size=16, num_pages=4096, max_model_len=8192, is_strict=False)
        section = SchedulerSection(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=512,
            max_decode_slowdown=self.max_decode_slowdown,
        )
        self.scheduler = Scheduler(KVCache(4096, 16), section, runner.info)

    def submit(self, num_tokens: int = _PROMPT_TOKENS, max_tokens: int = 128) -> int:
        request_id = len(self.tokens_s)
        prompt = tuple(range(request_id * 10_000, request_id * 10_000 + num_tokens))
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self.scheduler.submit(Submit(request_id, GenerateRequest(prompt, params)))
        self.tokens_s[request_id] = []
        return request_id

    def step(self) -> None:
        plan = self.scheduler.plan()
        assert plan is not None
        step_s = _step_s(plan.num_decodes, plan.num_prompt_tokens)
        self.now_s += step_s
        self.steps_s.append(step_s)
        output = StepOutput([[7] for _ in plan.step.samples])
        for request_id in self.scheduler.apply(plan, output, step_s).request_ids:
            self.tokens_s[request_id].append(self.now_s)

    def until_first_tokens(self, request_ids: list[int]) -> float:
        """Compute until each request has a token; return how long it took."""
        began_s = self.now_s
        while not all(self.tokens_s[request_id] for request_id in request_ids):
            self.step()
        return self.now_s - began_s

    def longest_gap_s(self, request_ids: list[int]) -> float:
        return max(
            after - before
            for request_id in request_ids
            for before, after in zip(
                self.tokens_s[request_id], self.tokens_s[request_id][1:], strict=False
            )
        )


def _back_to_back_s(num_prompts: int) -> float:
    num_tokens = num_prompts * _PROMPT_TOKENS
    return num_tokens * _TOKEN_S + -(-num_tokens // 512) * _STEP_S


@pytest.mark.parametrize("num_prompts", [8, 32, 64])
def test_the_last_prompt_of_a_burst_waits_little_longer_than_the_prompts_take(
    num_prompts: int,
) -> None:
    """It was twice as long: chunks grew only with the streams that had begun."""
    timed = Timed()
    burst = [timed.submit() for _ in range(num_prompts)]
    assert timed.until_first_tokens(burst) < 1.45 * _back_to_back_s(num_prompts)
    timed.scheduler.check()
    while timed.scheduler.has_work:
        timed.step()
    # No stream of the burst had a longer gap than prompts may cause beside all of them.
    assert timed.longest_gap_s(burst) < 1.05 * 3.0 * _step_s(num_prompts)


def test_a_burst_beside_an_older_stream_is_as_quick() -> None:
    timed = Timed()
    old = timed.submit(max_tokens=2000)
    while len(timed.tokens_s[old]) < 50:
        timed.step()
    burst = [timed.submit() for _ in range(31)]
    assert timed.until_first_tokens(burst) < 1.45 * _back_to_back_s(31)
    assert timed.longest_gap_s([old]) < 1.05 * 3.0 * _step_s(32)


@pytest.mark.parametrize("max_decode_slowdown", [1.5, 3.0])
def test_a_long_prompt_beside_eight_streams_keeps_their_bound(max_decode_slowdown: float) -> None:
    timed = Timed(max_decode_slowdown=max_decode_slowdown)
    streams = [timed.submit(max_tokens=2000) for _ in range(8)]
    while min(len(timed.tokens_s[stream]) for stream in streams) < 50:
        timed.step()
    num_steps = len(timed.steps_s)
    long = timed.submit(4000)
    timed.until_first_tokens([long])
    assert max(timed.steps_s[num_steps:]) < 1.05 * max_decode_slowdown * _step_s(9)


def test_requests_that_wait_for_a_slot_do_not_lengthen_a_step() -> None:
    """However many wait: none of them decodes before another has ended."""
    timed = Timed(max_num_seqs=8)
    for _ in range(100):
        timed.submit(max_tokens=64)
    while len(timed.tokens_s[0]) < 2:
        timed.step()
    num_steps = len(timed.steps_s)
    while timed.scheduler.stats().num_waiting > 50:
        timed.step()
    # Steps without a single decode have no stream to delay.
    assert max(timed.steps_s[num_steps:]) < max(1.1 * 3.0 * _step_s(8), _step_s(0, 512) + 1e-9)
