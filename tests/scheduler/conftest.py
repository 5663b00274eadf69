"""A scheduler on a small cache, driven step by step with the model that can be computed by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from cache.misses import MissReason
from cache.selection import Selection
from cache.view import FULL_VIEW, View
from configs.schema import SchedulerSection
from model.fake import FakeRunner, fake_output
from model.interface import SamplingParams, TokenLogprobs, WindowedPages
from scheduler.caches import build_cache
from scheduler.drafters.draft import Drafter
from scheduler.messages import FinishReason, GenerateRequest, Rejected, Submit
from scheduler.plan import StepPlan
from scheduler.scheduler import Scheduler


class Drive:
    """A scheduler, its cache and its model, and all that came out of them."""

    def __init__(
        self,
        *,
        num_pages: int = 64,
        page_size: int = 4,
        view: View = FULL_VIEW,
        max_model_len: int = 256,
        drafter: Drafter | None = None,
        guess_period: int = 0,
        windowed: WindowedPages | None = None,
        **config: Any,
    ) -> None:
        self.runner = FakeRunner(
            num_pages=num_pages,
            page_size=page_size,
            view=view,
            max_model_len=max_model_len,
            guess_period=guess_period,
            windowed=windowed,
        )
        section = SchedulerSection(**{"max_num_seqs": 8, "max_num_batched_tokens": 32} | config)
        self.cache = build_cache(self.runner.info, section)
        self.scheduler = Scheduler(self.cache, section, self.runner.info, drafter)
        self.outputs: dict[int, list[int]] = {}
        self.scores: dict[int, list[TokenLogprobs]] = {}
        self.finished: dict[int, FinishReason] = {}
        self.failed: dict[int, str] = {}
        #: (request id, verified tokens, accepted ones) of each draft.
        self.drafts: list[tuple[int, int, int]] = []
        self.displaced: list[int] = []
        self.plans: list[StepPlan] = []

    def submit(
        self,
        request_id: int,
        prompt: Sequence[int],
        *,
        max_tokens: int = 8,
        priority: int = 0,
        namespace: str = "",
        may_speculate: bool = True,
        own_view: View = FULL_VIEW,
        selection: Selection | None = None,
        **submit: Any,
    ) -> Rejected | None:
        params = submit.pop("params", None) or SamplingParams(
            max_tokens=max_tokens, ignore_eos=True
        )
        self.outputs[request_id] = []
        self.scores[request_id] = []
        refusals = self.scheduler.submit(
            Submit(
                request_id,
                GenerateRequest(
                    tuple(prompt),
                    params,
                    priority,
                    namespace,
                    may_speculate=may_speculate,
                    view=own_view,
                    selection=selection,
                ),
                **submit,
            )
        )
        if [refused.request_id for refused in refusals] == [request_id]:
            return refusals[0]
        self.displaced += [refused.request_id for refused in refusals]
        return None

    def step(self, elapsed_s: float = 0.0) -> StepPlan | None:
        plan = self.scheduler.plan()
        if plan is not None:
            self.plans.append(plan)
            self.apply(plan, elapsed_s)
        self.scheduler.check()
        return plan

    def apply(self, plan: StepPlan, elapsed_s: float = 0.0) -> None:
        outcome = self.scheduler.apply(plan, self.runner.launch(plan.step).wait(), elapsed_s)
        for request_id, token_id in zip(outcome.request_ids, outcome.token_ids, strict=True):
            self.outputs[request_id].append(token_id)
        for request_id, scores in outcome.prompt_logprobs:
            self.scores[request_id] += scores
        for request_id, num_offered, num_accepted in outcome.drafts:
            self.drafts.append((request_id, num_offered, num_accepted))
        self.finished.update(outcome.finished)
        self.failed.update(outcome.failed)

    def started(self, plan: StepPlan) -> list[tuple[int, int, MissReason]]:
        """List the requests that a plan started: id, reused tokens, why no more."""
        return [(id_, misses.num_reused_tokens, misses.reason) for id_, misses in plan.started]

    def run(self, max_steps: int = 2000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        message = f"not done after {max_steps} steps"
        raise AssertionError(message)

    def expected(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        return fake_output(prompt, num_tokens, self.runner.vocab_size)


@pytest.fixture
def make_drive() -> Callable[..., Drive]:
    return Drive
