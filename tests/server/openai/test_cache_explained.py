"""`POST /admin/cache/explain`: the reuse of a prompt that came now, and why no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

EXPLAIN = "/admin/cache/explain"


@pytest.fixture
def live(start_server: Callable[..., Any]) -> Any:
    return start_server(dev_endpoints=True)


def test_what_it_says_is_what_happens_then(live: Any) -> None:
    for prompt in ("abcdefghijkl", "abcdefXYZ", "abcdefghijkl"):
        told = live.post(EXPLAIN, prompt=prompt).json()
        assert told.pop("prompt_tokens") == len(prompt)
        answer = live.post("/v1/completions", prompt=prompt, max_tokens=1).json()
        assert told == answer["octavo"]["cache"]


def test_it_changes_nothing(live: Any) -> None:
    first = live.post(EXPLAIN, prompt="abcdefghijkl").json()
    assert first["missed_tokens"] == {"never": 11}
    assert live.post(EXPLAIN, prompt="abcdefghijkl").json() == first
    assert live.metric('octavo_prefix_cache_missed_tokens_total{reason="never"}') == 0


def test_a_chat_and_a_salt(live: Any) -> None:
    messages = [{"role": "user", "content": "hello, you there"}]
    asked = live.post("/v1/chat/completions", messages=messages, max_tokens=1).json()
    told = live.post(EXPLAIN, messages=messages).json()
    assert told["prompt_tokens"] == asked["usage"]["prompt_tokens"]
    assert told["reused_tokens"] > 0
    salted = live.post(EXPLAIN, messages=messages, cache_salt="mine").json()
    assert (salted["reused_tokens"], salted["miss_reason"]) == (0, "never")


def test_a_message_of_a_chat_is_named_where_it_diverges(live: Any) -> None:
    turns = [
        {"role": "user", "content": "first question"},
        {"role": "assistant", "content": "an answer"},
        {"role": "user", "content": "second question"},
    ]
    live.post("/v1/chat/completions", messages=turns, max_tokens=1)
    changed = [turns[0], {"role": "assistant", "content": "an aNSWER"}, turns[2]]
    answer = live.post("/v1/chat/completions", messages=changed, max_tokens=1).json()
    place = answer["octavo"]["cache"]["diverged_at"]
    assert place["path"] == "messages.1.content"
    assert place["before"].endswith("an a")
    assert place["after"].startswith("NSWER")


def test_wrong_prompts_are_refused_by_name(
    live: Any, start_server: Callable[..., Any], absent: Any
) -> None:
    assert live.post(EXPLAIN).json()["error"]["param"] == "prompt"
    assert live.post(EXPLAIN, prompt="").json()["error"]["param"] == "prompt"
    assert absent.post(EXPLAIN, prompt="x").status_code == 404, "without the flag"
    without_engine = start_server(type(absent.client)(), dev_endpoints=True)
    assert without_engine.post(EXPLAIN, prompt="x").status_code == 503
