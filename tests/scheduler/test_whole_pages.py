"""Where pages are encoded as a whole, prefixes are reused in whole pages."""

from __future__ import annotations

import pytest

from configs.schema import SchedulerSection
from model.fake import FakeRunner
from model.interface import SamplingParams
from scheduler.engine import Engine
from scheduler.messages import GenerateRequest, Submit


@pytest.mark.parametrize(("multiple", "reused"), [(1, [0, 9, 6]), (4, [0, 8, 4])])
def test_a_prefix_is_a_multiple_of_the_model_s(multiple: int, reused: list[int]) -> None:
    runner = FakeRunner(page_size=4, smallest_reusable_prefix_tokens=multiple)
    engine = Engine(runner, SchedulerSection(), lambda: 0.0, lambda _: None)
    prompt, found = tuple(range(1, 11)), list[int]()
    for number, tokens in enumerate((prompt, prompt, (*prompt[:6], 40, 41, 42))):
        params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
        engine.handle(Submit(number, GenerateRequest(tokens, params)))
        while engine.has_work:
            found += [started.cached_tokens for started in engine.step().started]
    engine.close()
    assert found == reused
