"""Every set of requests ends in a bounded number of steps, however few pages there are.

Pools have the pages of one sequence, or a few more, and the prompts share a beginning. So
sequences lack pages, preempt others and wait for others in nearly every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import hypothesis.strategies as st
from hypothesis import example, given, settings

from cache.view import View
from configs.schema import SchedulerSection
from model.fake import FakeRunner, fake_output
from model.interface import SamplingParams
from scheduler.engine import Engine
from scheduler.messages import GenerateRequest, Submit


@dataclass(frozen=True)
class Asked:
    """A request; the first `num_shared` tokens of its prompt are those of the others, too."""

    num_shared: int
    num_own: int
    max_tokens: int
    priority: int = 0
    is_scored: bool = False
    #: Steps before it arrives.
    arrival: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_shared + self.num_own + self.max_tokens

    def prompt(self, request_id: int) -> tuple[int, ...]:
        return (*range(1, 1 + self.num_shared), *[40 + request_id] * self.num_own)

    def submit(self, request_id: int) -> Submit:
        params = SamplingParams(
            max_tokens=self.max_tokens,
            ignore_eos=True,
            prompt_logprobs=0 if self.is_scored else None,
        )
        request = GenerateRequest(self.prompt(request_id), params, self.priority)
        return Submit(request_id, request)


@dataclass(frozen=True)
class Scene:
    view: View
    page_size: int
    #: Pages that one sequence alone does not need.
    num_spare_pages: int
    max_num_seqs: int
    #: Tokens of the budget beside one for each sequence.
    num_spare_tokens: int
    max_steps_in_flight: int
    requests: tuple[Asked, ...]

    @property
    def num_pages(self) -> int:
        """The fewest pages with which no request is refused, and the spare ones."""
        longest = max(asked.num_tokens for asked in self.requests)
        # The keys of the newest token are never read.
        num_pages = -(-(longest - 1) // self.page_size)
        most_read = self.view.num_pages(self.page_size)
        return min(num_pages, most_read or num_pages) + self.num_spare_pages

    @property
    def max_num_steps(self) -> int:
        """Two steps a token: one where it is computed, and one where it was to be."""
        last_arrival = max(asked.arrival for asked in self.requests)
        return last_arrival + 2 * sum(asked.num_tokens for asked in self.requests)

    def engine(self) -> Engine:
        runner = FakeRunner(
            page_size=self.page_size,
            num_pages=self.num_pages,
            view=self.view,
            max_steps_in_flight=self.max_steps_in_flight,
        )
        section = SchedulerSection(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_seqs + self.num_spare_tokens,
            debug=True,
        )
        ticks = count()
        return Engine(runner, section, lambda: float(next(ticks)), lambda _: None)


def run(scene: Scene) -> None:
    engine = scene.engine()
    outputs: dict[int, list[int]] = {}
    for number in count():
        for request_id, asked in enumerate(scene.requests):
            if asked.arrival == number:
                outputs[request_id] = []
                engine.handle(asked.submit(request_id))
        if not engine.has_work and len(outputs) == len(scene.requests):
            break
        assert number < scene.max_num_steps, "it does not end"
        result = engine.step()
        assert not result.rejected
        for request_id, token_id in zip(result.request_ids, result.token_ids, strict=True):
            outputs[request_id].append(token_id)
    for request_id, asked in enumerate(scene.requests):
        prompt = asked.prompt(request_id)
        assert outputs[request_id] == fake_output(prompt, asked.max_tokens, view=scene.view)
    stats = engine.stats()
    assert stats.cache.pages_private == stats.cache.pages_leased == 0
    assert stats.scheduler.faulty_rows_total == 0, "a step raised, and its rows ran again"
    if len(scene.requests) == 1:
        assert stats.scheduler.preemptions_total == 0, "it preempted itself"


REQUESTS = st.builds(
    Asked,
    num_shared=st.sampled_from([0, 3, 6, 9, 16]),
    num_own=st.integers(1, 6),
    max_tokens=st.integers(1, 10),
    priority=st.integers(0, 1),
    is_scored=st.booleans(),
    arrival=st.sampled_from([0, 0, 0, 5, 20]),
)
SCENES = st.builds(
    Scene,
    view=st.builds(
        View, st.sampled_from([0, 0, 1, 2, 3, 5]), st.sampled_from([None, *range(1, 9)])
    ),
    page_size=st.integers(1, 4),
    num_spare_pages=st.integers(0, 4),
    max_num_seqs=st.integers(1, 4),
    num_spare_tokens=st.integers(0, 8),
    max_steps_in_flight=st.integers(1, 3),
    requests=st.lists(REQUESTS, min_size=1, max_size=5).map(tuple),
)


@settings(max_examples=300)
@given(scene=SCENES)
@example(scene=Scene(View(0, 6), 2, 0, 3, 0, 2, (Asked(16, 1, 8), Asked(16, 1, 8))))
@example(scene=Scene(View(0, 4), 1, 1, 1, 1, 2, (Asked(9, 1, 7),)))
@example(scene=Scene(View(3, 7), 1, 0, 2, 0, 3, (Asked(16, 2, 3),)))
def test_every_set_of_requests_ends(scene: Scene) -> None:
    run(scene)
