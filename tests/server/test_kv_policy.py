"""The policy of a request's keys, in all APIs: honoured, reported, and wrong values named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from model.fake import fake_output
from scheduler.client import FULL_VIEW, FinishReason, Selection, TokenOutput, View

SINKS = {"type": "sinks", "window": 64, "sinks": 4}
MORPH = {"type": "morph", "window": 16, "capacity": 64}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
#: Each with a prompt of more than the 256 tokens of the model's context.
LONG: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "y" * 400}]},
    TEXT: {"prompt": "y" * 400},
    "/v1/responses": {"input": "y" * 400},
    "/v1/messages": {"messages": [{"role": "user", "content": "y" * 400}]},
}


def body_of(route: str, **more: Any) -> dict[str, Any]:
    name = "max_output_tokens" if route == "/v1/responses" else "max_tokens"
    return LONG[route] | {name: 5} | more


def octavo_of(events: str) -> dict[str, Any]:
    """Return the last report of a stream."""
    found = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    reports = [one["octavo"] for one in found if one.get("octavo")]
    reports += [one["response"]["octavo"] for one in found if one.get("response", {}).get("octavo")]
    report: dict[str, Any] = reports[-1]
    return report


@pytest.mark.parametrize("route", LONG)
@pytest.mark.parametrize("is_stream", [False, True])
def test_an_answer_reports_the_view_it_was_generated_under(
    shared: Any, route: str, is_stream: bool
) -> None:
    answer = shared.post(route, **body_of(route, kv_policy=SINKS, stream=is_stream))
    assert answer.status_code == 200, answer.text
    octavo = octavo_of(answer.text) if is_stream else answer.json()["octavo"]
    assert octavo["warnings"] == []
    kv = octavo["kv"]
    assert (kv["policy"], kv["window"], kv["sinks"], kv["held_tokens"]) == ("sinks", 64, 4, 68)
    assert kv["dropped_tokens"] >= 400 + 5 - 68 - 5


def test_a_prompt_beyond_the_context_is_answered_under_a_bounded_view_alone(shared: Any) -> None:
    prompt = [1 + i * i % 61 for i in range(400)]
    fields: dict[str, Any] = {"prompt": prompt, "max_tokens": 9, "return_token_ids": True}
    refused = shared.post(TEXT, **fields, ignore_eos=True)
    assert refused.status_code == 400
    assert "maximum context length is 256 tokens" in refused.json()["error"]["message"]
    for policy, view in (
        (SINKS, View(4, 64)),
        ({"type": "window", "window": 70}, View(window=70)),
        ({"type": "sinks", "window": 100}, View(4, 100)),
    ):
        answer = shared.post(TEXT, **fields, ignore_eos=True, kv_policy=policy)
        assert answer.status_code == 200, answer.text
        expected = fake_output(prompt, 9, 300, view=view)
        assert answer.json()["choices"][0]["token_ids"] == expected
        kv = answer.json()["octavo"]["kv"]
        assert kv["held_tokens"] == view.max_keys
        assert kv["dropped_tokens"] == 409 - kv["held_tokens"]


def test_a_short_text_drops_nothing_and_choices_are_summed_up(shared: Any) -> None:
    fields: dict[str, Any] = {"prompt": [9] * 10, "max_tokens": 60, "ignore_eos": True}
    before = shared.metric("octavo_kv_dropped_tokens_total")
    kv = shared.post(TEXT, **fields, n=2, kv_policy=SINKS).json()["octavo"]["kv"]
    assert (kv["held_tokens"], kv["dropped_tokens"]) == (2 * 68, 2 * 2)
    kv = shared.post(TEXT, **fields | {"max_tokens": 3}, kv_policy=SINKS).json()["octavo"]["kv"]
    assert (kv["held_tokens"], kv["dropped_tokens"]) == (13, 0)
    assert shared.metric("octavo_kv_dropped_tokens_total") - before == 2 * 2


@pytest.mark.parametrize("route", LONG)
@pytest.mark.parametrize("is_stream", [False, True])
def test_an_answer_by_score_reports_the_keys_that_it_kept(
    shared: Any, route: str, is_stream: bool
) -> None:
    body = body_of(route, kv_policy=MORPH | {"fusion": "max"}, stream=is_stream)
    name = "max_output_tokens" if route == "/v1/responses" else "max_tokens"
    refused = shared.post(route, **json.loads(json.dumps(body).replace("y" * 400, "y" * 130)))
    assert "tokens of the prompt, and the 128 that are kept behind it, need" in refused.text
    text = json.loads(json.dumps(body).replace("y" * 400, "y" * 50)) | {name: 110}
    answer = shared.post(route, **text)
    assert answer.status_code == 200, answer.text
    octavo = octavo_of(answer.text) if is_stream else answer.json()["octavo"]
    assert octavo["warnings"] == []
    kv = octavo["kv"]
    # The fake model may end an answer early.
    assert kv.pop("held_tokens") + kv.pop("dropped_tokens") > 50
    assert kv == {"policy": "morph", "window": 16, "capacity": 64, "fusion": "max"}


def test_tokens_are_those_of_the_selection_and_dropped_ones_are_counted(shared: Any) -> None:
    prompt = [1 + i * i % 61 for i in range(120)]
    fields: dict[str, Any] = {"prompt": prompt, "max_tokens": 130, "return_token_ids": True}
    before = shared.metric("octavo_kv_dropped_tokens_total")
    answer = shared.post(TEXT, **fields, ignore_eos=True, kv_policy=MORPH)
    assert answer.status_code == 200, answer.text
    expected = fake_output(prompt, 130, 300, selection=Selection(16, 64))
    assert answer.json()["choices"][0]["token_ids"] == expected
    kv = answer.json()["octavo"]["kv"]
    # With 128 tokens 64 were dropped, and 64 tokens later as many again.
    assert (kv["held_tokens"], kv["dropped_tokens"]) == (122, 128)
    assert shared.metric("octavo_kv_dropped_tokens_total") - before == 128
    answer = shared.post(TEXT, **fields, ignore_eos=True, kv_policy=MORPH | {"type": "h2o"})
    kv = answer.json()["octavo"]["kv"]
    assert kv.pop("held_tokens") == 122
    assert kv == {"policy": "h2o", "window": 16, "capacity": 64, "dropped_tokens": 128}
    answer = shared.post(TEXT, **fields, n=2, ignore_eos=True, kv_policy=MORPH)
    kv = answer.json()["octavo"]["kv"]
    assert (kv["held_tokens"], kv["dropped_tokens"]) == (244, 256), "n answers are n sequences"


@pytest.mark.parametrize("policy", [None, {"type": "full"}])
def test_a_full_view_is_not_reported(shared: Any, policy: dict[str, Any] | None) -> None:
    assert "kv" not in shared.chat(kv_policy=policy, max_tokens=2).json()["octavo"]


@pytest.mark.parametrize("route", LONG)
@pytest.mark.parametrize(
    ("policy", "param", "message"),
    [
        ({"type": "window", "window": 63}, "kv_policy.window", "must be at least 64, got 63"),
        ({"type": "window"}, "kv_policy.window", "is required with type window"),
        ({"type": "sinks", "sinks": 4}, "kv_policy.window", "is required with type sinks"),
        ({"type": "sinks", "window": 64, "sinks": 0}, "kv_policy.sinks", "at least 1, got 0"),
        ({"type": "window", "window": 64, "sinks": 4}, "kv_policy.sinks", "must be left out"),
        ({"type": "full", "window": 64}, "kv_policy.window", "must be left out with type full"),
        ({"type": "sinks", "window": 253}, "kv_policy.window", "reads 257 tokens, more than"),
        ({"type": "window", "window": "64"}, "kv_policy.window", "integer"),
        ({"type": "morph", "capacity": 64}, "kv_policy.window", "is required with type morph"),
        ({"type": "morph", "window": 16}, "kv_policy.capacity", "is required with type morph"),
        (MORPH | {"window": 15}, "kv_policy.window", "must be from 16 to 256"),
        (MORPH | {"capacity": 63}, "kv_policy.capacity", "at least 64 and above the window of 16"),
        (MORPH | {"capacity": 257}, "kv_policy.capacity", "reads 257 tokens, more than"),
        (MORPH | {"sinks": 4}, "kv_policy.sinks", "must be left out with type morph"),
        (MORPH | {"fusion": "mean"}, "kv_policy.fusion", "'sum' or 'max'"),
        (SINKS | {"capacity": 90}, "kv_policy.capacity", "must be left out with type sinks"),
        (SINKS | {"fusion": "max"}, "kv_policy.fusion", "must be left out with type sinks"),
        ({"type": "h2o", "window": 64}, "kv_policy.capacity", "is required with type h2o"),
        (MORPH | {"type": "h2o", "fusion": "max"}, "kv_policy.fusion", "must be left out"),
        ({"type": "ring"}, "kv_policy.type", "'full', 'window', 'sinks', 'morph' or 'h2o'"),
        ({"window": 64}, "kv_policy.type", "required"),
        ("sinks", "kv_policy", "Input should be"),
    ],
    ids=str,
)
def test_a_wrong_policy_is_named(
    shared: Any, route: str, policy: object, param: str, message: str
) -> None:
    answer = shared.post(route, **body_of(route, kv_policy=policy))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert param in error["message"]
    assert error.get("param", param) == param


def test_unknown_parts_of_a_policy_are_warned_of(shared: Any) -> None:
    answer = shared.chat(kv_policy=SINKS | {"budget": 9}, max_tokens=2).json()
    assert [one["param"] for one in answer["octavo"]["warnings"]] == ["kv_policy.budget"]


def test_the_server_has_a_default_that_a_request_replaces(start_server: Any) -> None:
    live = start_server(cache={"kv_policy": "sinks:4+64"})
    kv = live.post(TEXT, **body_of(TEXT)).json()["octavo"]["kv"]
    assert (kv["policy"], kv["held_tokens"]) == ("sinks", 68)
    answer = live.post(TEXT, **body_of(TEXT, kv_policy={"type": "full"}))
    assert answer.status_code == 400
    kv = live.chat("x" * 90, kv_policy={"type": "window", "window": 70}).json()["octavo"]["kv"]
    assert (kv["policy"], kv["sinks"], kv["held_tokens"]) == ("window", 0, 70)


def test_a_model_without_views_says_why(
    start_server: Any, scripted_client: Callable[..., Any]
) -> None:
    client = scripted_client(None)
    client.info = replace(
        client.info,
        why_no_views="attention backend flash reads all keys",
        why_no_selections="layers of the model have windows",
    )
    answer = start_server(client).chat(kv_policy=SINKS)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "kv_policy"
    assert "sinks:4+64 is not served: attention backend flash" in answer.json()["error"]["message"]
    client.info = replace(client.info, why_no_views="")
    answer = start_server(client).chat(kv_policy=MORPH)
    assert answer.json()["error"]["param"] == "kv_policy"
    assert "morph:16/64 is not served: layers of the" in answer.json()["error"]["message"]


def test_a_narrower_window_of_the_model_is_what_counts(
    scripted_client: Callable[..., Any],
) -> None:
    client = scripted_client(None)
    assert client.info.max_len(View(4, 64)) > 10**6
    assert client.info.max_len(View(4, 300)) == client.info.max_len(FULL_VIEW) == 256
    narrow = replace(client.info, view=View(window=32))
    assert narrow.max_len(View(4, 64)) == 256


def test_an_answer_without_a_limit_has_that_of_the_context(
    start_server: Any, scripted_client: Callable[..., Any]
) -> None:
    async def silent(_: object, request: Any) -> Any:
        limits.append(request.params.max_tokens)
        yield TokenOutput((72,), finish_reason=FinishReason.STOP)

    limits: list[int] = []
    live = start_server(scripted_client(silent))
    live.post(CHAT, **LONG[CHAT], kv_policy=SINKS)
    live.chat("x", kv_policy=SINKS)
    assert limits == [256, 256]
