"""The cost of planning and applying one step, without a model. Prints; asserts nothing."""

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


def main() -> None:
    """Print the median and worst time of `plan` + `apply` for 256 decoding sequences."""
    runner = FakeRunner(page_size=16, num_pages=16_384, max_model_len=4096, is_strict=False)
    scheduler = Scheduler(
        KVCache(16_384, 16),
        SchedulerSection(max_num_seqs=_NUM_SEQUENCES, max_num_batched_tokens=65_536),
        runner.info,
    )
    params = SamplingParams(max_tokens=2000, ignore_eos=True)
    for i in range(_NUM_SEQUENCES):
        scheduler.submit(Submit(i, GenerateRequest(tuple(range(i, i + 100 + i % 16)), params)))
    times_us = [_step_us(scheduler) for _ in range(_NUM_STEPS)][4:]
    print(  # noqa: T201 - a benchmark's only purpose
        f"plan + apply, {_NUM_SEQUENCES} running: "
        f"median {statistics.median(times_us):.0f} us, worst {max(times_us):.0f} us"
    )


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
