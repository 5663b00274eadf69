"""The cost of planning and applying one step, without a model. Prints; asserts nothing."""

# ruff: noqa: T201 - printing is all a benchmark is for

from __future__ import annotations

import statistics
import time

from cache.kv_cache import KVCache
from configs.schema import SchedulerSection
from model.fake import FakeRunner
from model.interface import SamplingParams, StepOutput
from scheduler.messages import GenerateRequest, Submit
from scheduler.scheduler import Scheduler

_NUM_SEQUENCES = 256
_NUM_STEPS = 400
_PREFIX = tuple(range(8000))


def main() -> None:
    """Print the median and worst time of `plan` + `apply` in two states of the queue."""
    _print(f"{_NUM_SEQUENCES} running", _running())
    _print("8 running, a prompt of 16,000 tokens blocked", _blocked())


def _print(state: str, scheduler: Scheduler) -> None:
    times_us = [_step_us(scheduler) for _ in range(_NUM_STEPS)][4:]
    median_us, worst_us = statistics.median(times_us), max(times_us)
    print(f"plan + apply, {state}: median {median_us:.0f} us, worst {worst_us:.0f} us")


def _scheduler(num_pages: int, max_num_batched_tokens: int) -> Scheduler:
    info = FakeRunner(page_size=16, num_pages=num_pages, max_model_len=32_768, is_strict=False).info
    section = SchedulerSection(
        max_num_seqs=_NUM_SEQUENCES, max_num_batched_tokens=max_num_batched_tokens
    )
    return Scheduler(KVCache(num_pages, 16), section, info)


def _submit(scheduler: Scheduler, request_id: int, prompt: tuple[int, ...]) -> None:
    params = SamplingParams(max_tokens=2000, ignore_eos=True)
    scheduler.submit(Submit(request_id, GenerateRequest(prompt, params)))


def _running() -> Scheduler:
    scheduler = _scheduler(16_384, 65_536)
    for i in range(_NUM_SEQUENCES):
        _submit(scheduler, i, tuple(range(i, i + 100 + i % 16)))
    return scheduler


def _blocked() -> Scheduler:
    """Return one in which a long prompt waits for pages, most of which it finds cached."""
    scheduler = _scheduler(1000, 65_536)
    for i in range(8):
        _submit(scheduler, i, (*_PREFIX, i) if i == 0 else tuple(range(i, i + 100)))
    _step_us(scheduler)
    _submit(scheduler, 8, (*_PREFIX, *range(20_000, 28_000)))
    return scheduler


def _step_us(scheduler: Scheduler) -> float:
    began = time.perf_counter()
    plan = scheduler.plan()
    planned = time.perf_counter()
    assert plan is not None
    output = StepOutput([[7] for _ in plan.step.samples])
    applying = time.perf_counter()
    scheduler.apply(plan, output)
    return (time.perf_counter() - applying + planned - began) * 1e6


if __name__ == "__main__":
    main()
