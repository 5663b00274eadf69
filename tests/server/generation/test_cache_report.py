"""`octavo.cache` in answers: the reused tokens, and the reasons of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from event_streams import chunks_of
from model.fake import FakeRunner
from scheduler.cache_story import MISS_REASONS

COMPLETIONS = "/v1/completions"


def report(live: Any, prompt: Any, **body: Any) -> Any:
    answer = live.post(COMPLETIONS, prompt=prompt, max_tokens=1, **body).json()
    found = answer["octavo"]["cache"]
    usage = answer["usage"]
    num_prompts = len(prompt) if isinstance(prompt, list) else 1
    num_missed = sum(found["missed_tokens"].values())
    assert found["reused_tokens"] + num_missed == usage["prompt_tokens"] - num_prompts
    assert found["reused_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
    return found


def test_each_missed_token_has_a_reason(live: Any) -> None:
    assert report(live, "abcdefghijkl") == {
        "reused_tokens": 0,
        "miss_reason": "never",
        "missed_tokens": {"never": 11},
    }
    assert report(live, "abcdefghijkl") == {
        "reused_tokens": 11,
        "miss_reason": "complete",
        "missed_tokens": {},
    }
    assert report(live, "abcdefXYZ") == {
        "reused_tokens": 6,
        "miss_reason": "diverged",
        "missed_tokens": {"diverged": 2},
        "diverged_at": {"token": 6, "path": "prompt", "before": "abcdef", "after": "XYZ"},
    }


def test_a_prompt_is_shown_around_the_place_alone(live: Any) -> None:
    report(live, "0123456789" * 4)
    found = report(live, "0123456789" * 2 + "X23456789" * 3)
    place = {"token": 20, "path": "prompt", "before": "23456789", "after": "X2345678"}
    assert found["diverged_at"] == place


def test_several_prompts_are_summed_up(live: Any) -> None:
    report(live, "abcdefgh")
    found = report(live, ["abcdXXX", "qrstuv"])
    assert found == {
        "reused_tokens": 4,
        "miss_reason": "diverged",
        "missed_tokens": {"diverged": 2, "never": 5},
    }


def test_an_evicted_prompt_is_said_to_be_evicted(start_server: Callable[..., Any]) -> None:
    live = start_server(runner=FakeRunner(vocab_size=512, num_pages=6, page_size=4))
    report(live, "abcdefgh")
    report(live, "0123456789012345678")
    found = report(live, "abcdefgh")
    assert found["missed_tokens"] == {"evicted": 3}, "of the second page"
    assert found["evicted"] == {"cause": "room", "age_s": 0.0}
    assert live.metric("octavo_prefix_cache_ghost_hits_total") == 3
    assert live.metric("octavo_prefix_cache_ghost_seconds_total") == 0, "no step was timed"
    missed = {
        reason: live.metric(f'octavo_prefix_cache_missed_tokens_total{{reason="{reason}"}}')
        for reason in MISS_REASONS
    }
    assert missed == dict.fromkeys(MISS_REASONS, 0) | {"never": 7 + 18, "evicted": 3}
    assert live.metric("octavo_smallest_reusable_prefix_tokens") == 1


def test_streams_and_all_apis_have_the_report(live: Any) -> None:
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    whole = live.post("/v1/chat/completions", **chat).json()["octavo"]["cache"]
    assert whole["miss_reason"] == "never"
    stream = live.post("/v1/chat/completions", stream=True, **chat).content
    [report] = [chunk["octavo"]["cache"] for chunk in chunks_of(stream) if "octavo" in chunk]
    assert report["reused_tokens"] > 0
    for path, body in (
        ("/v1/messages", chat),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 1}),
    ):
        found = live.post(path, **body).json()["octavo"]["cache"]
        assert found["reused_tokens"] > 0, path
        assert sum(found["missed_tokens"].values()) < 4, path
