"""The reasons of missed tokens on their way out of the engine, and their counts."""

from __future__ import annotations

from cache.ghosts import Cause, Eviction
from cache.misses import Misses, MissReason
from configs.schema import SchedulerSection
from model.fake import FakeRunner
from model.interface import SamplingParams
from scheduler.cache_story import MISS_REASONS, CacheStory, story_of, summed_story
from scheduler.engine import Engine
from scheduler.lookups import Lookups
from scheduler.messages import GenerateRequest, ResetCache, Submit
from scheduler.stats import MissStats

PROMPT = tuple(range(1, 14))


class Served:
    """An engine with a pool of six pages, and a clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 10.0
        runner = FakeRunner(page_size=4, num_pages=6)
        self.engine = Engine(runner, SchedulerSection(), lambda: self.now_s, lambda _: None)
        self.num_requests = 0

    def story(self, prompt: tuple[int, ...]) -> CacheStory:
        """Serve a prompt; return the story of its start."""
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        self.engine.handle(Submit(self.num_requests, GenerateRequest(prompt, params)))
        self.num_requests += 1
        started = []
        while self.engine.has_work:
            started += self.engine.step().started
        [only] = started
        assert only.cached_tokens == only.story.reused_tokens
        self.engine.check()
        return only.story


def test_a_request_starts_with_the_reasons_of_its_missed_tokens() -> None:
    served = Served()
    assert served.story(PROMPT) == CacheStory(0, (("never", 12),))
    assert served.story(PROMPT) == CacheStory(12)
    assert served.story((*PROMPT[:6], 9, 9)) == CacheStory(6, (("diverged", 1),), 6)
    served.now_s = 12.5
    served.story(tuple(range(40, 63)))
    served.now_s = 20.0
    again = served.story(PROMPT)
    assert (again.eviction_cause, again.evicted_age_s, again.reason) == ("room", 7.5, "evicted")
    assert served.engine.stats().scheduler.misses.ghost_tokens_total == 12
    served.now_s = 21.0
    served.engine.handle(ResetCache())
    served.now_s = 24.0
    assert served.story(PROMPT) == CacheStory(0, (("evicted", 12),), None, "reset", 3.0)
    stats = served.engine.stats().scheduler
    missed = dict(stats.misses.missed_tokens_total)
    assert missed == {"never": 12 + 22, "diverged": 1, "evicted": 24}
    assert stats.prefix_hits_tokens_total == 12 + 6
    num_queried = stats.prefix_queries_tokens_total
    assert sum(missed.values()) + stats.prefix_hits_tokens_total == num_queried - 6
    assert stats.misses.ghost_tokens_total == 12, "a larger pool would be reset, too"


def test_the_time_of_a_larger_pool_is_estimated_by_the_price_of_a_token() -> None:
    lookups = Lookups()
    evicted = ((MissReason.EVICTED, 100), (MissReason.NEVER, 7))
    lookups.add(200, Misses(92, evicted, None, Eviction(Cause.ROOM, 0.0)), None)
    lookups.add(200, Misses(92, evicted, None, Eviction(Cause.PIN_LAPSED, 0.0)), 0.002)
    lookups.add(200, Misses(92, evicted, None, Eviction(Cause.FAULT, 0.0)), 0.002)
    expected = MissStats((("evicted", 300), ("never", 21)), 200, 200_000)
    assert lookups.stats() == expected


def test_stories_of_several_prompts_are_summed_up() -> None:
    first = CacheStory(5, (("evicted", 2), ("never", 1)), None, "room", 4.0)
    second = CacheStory(1, (("never", 3),), 1)
    both = summed_story([first, second])
    assert both == CacheStory(6, (*first.missed, *second.missed), None, "room", 4.0)
    assert both.missed_by_reason() == {"evicted": 2, "never": 4}
    assert summed_story([second]) is second
    assert summed_story([CacheStory(3), CacheStory(2)]) == CacheStory(5)


def test_a_story_has_plain_words() -> None:
    misses = Misses(1, ((MissReason.VIEW, 4),), None, None)
    story = story_of(misses, 9.0)
    assert story == CacheStory(1, (("view", 4),))
    assert type(story.missed[0][0]) is str, "an enum costs more to pickle"
    assert CacheStory().reason == "complete"
    assert "complete" not in MISS_REASONS
    assert story.reason in MISS_REASONS
