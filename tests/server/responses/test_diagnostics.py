"""`prompt_cache_diagnostics`: the part that changed since the response that a request names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

Body = dict[str, Any]
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }} <tool_call>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ reasoning_effort }}"
)
FIRST: Body = {"instructions": "Be a calculator, and be brief.", "input": "What is one and one?"}
TOOL: Body = {"type": "function", "name": "add", "parameters": {"type": "object"}}


@pytest.fixture
def live(speaking: Callable[..., Any]) -> Any:
    return speaking("Two.", template=TEMPLATE)


def ask(live: Any, earlier: str | None, **changed: Any) -> Any:
    body = {**FIRST, "prompt_cache_options": {"comparison_response_id": earlier}, **changed}
    answer = live.post("/v1/responses", **body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"tools": [TOOL]}, "tools_changed"),
        ({"instructions": "Be a poet."}, "input_changed"),
        ({"input": "What is two and two?"}, "input_changed"),
        ({"kv_policy": {"type": "window", "window": 64}}, "model_changed"),
    ],
)
def test_a_miss_has_the_part_that_changed(live: Any, changed: Body, reason: str) -> None:
    first = ask(live, None)
    assert "prompt_cache_diagnostics" not in first
    answer = ask(live, first["id"], **changed)
    found = answer["prompt_cache_diagnostics"]
    assert (found["type"], found["reason"]) == ("cache_miss", reason)
    num_tokens = found["comparison_reusable_tokens"] + found["cache_missed_tokens"]
    assert num_tokens == answer["usage"]["input_tokens"]
    assert answer["octavo"]["cache"]["compared"]["is_found"]


def test_a_hit_a_stranger_and_another_setting(live: Any) -> None:
    first = ask(live, None)["id"]
    more = [
        {"role": "user", "content": FIRST["input"]},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Why?"},
    ]
    assert ask(live, first, input=more)["prompt_cache_diagnostics"] == {"type": "cache_hit"}
    not_found = {"type": "comparison_response_not_found"}
    assert ask(live, "resp_unknown")["prompt_cache_diagnostics"] == not_found
    unavailable = {"type": "unavailable"}
    assert ask(live, first, cache_salt="s")["prompt_cache_diagnostics"] == unavailable


def test_its_client_reads_it(live: Any) -> None:
    first = ask(live, None)["id"]
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    options: Any = {"comparison_response_id": first}
    response = client.responses.create(
        model="fake", input="Something else", prompt_cache_options=options
    )
    found = response.prompt_cache_diagnostics
    assert found is not None
    assert found.type == "cache_miss"
    assert found.reason == "input_changed"
    client.close()


def test_a_chat_is_not_compared(live: Any) -> None:
    options = {"comparison_response_id": "resp_1"}
    answer = live.chat("x", prompt_cache_options=options).json()
    [warning] = answer["octavo"]["warnings"]
    assert warning["param"] == "prompt_cache_options.comparison_response_id"
