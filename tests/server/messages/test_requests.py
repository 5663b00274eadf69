"""The parts of a Messages request that reach the model, and the warnings about the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anthropic
import pytest
from pydantic import TypeAdapter

from server.generation import params as chat_params
from server.messages import params
from server.messages.response_models import TokenCount
from server.messages.schemas import MessagesRequest, SharedFields
from tools import api_table

USER: Any = {"role": "user", "content": "1+1?"}
TOOL: Any = {"name": "add", "input_schema": {"type": "object"}}
ASKED: dict[str, Any] = {"model": "fake", "max_tokens": 9, "messages": [USER]}

Saying = Callable[..., Any]


def text(content: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": content, **more}


def turn(role: str, *blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": list(blocks)}


def call(call_id: str, a: int = 7) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": "add", "input": {"a": a}}


def result(call_id: str, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, **more}


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "string": ({}, "[user]1+1?[answer]"),
    "system": ({"system": "Be kind."}, "[system]Be kind.[user]1+1?[answer]"),
    "system blocks": (
        {"system": [text("Be"), text("kind.")]},
        "[system]Be\nkind.[user]1+1?[answer]",
    ),
    "system in between": (
        {"messages": [USER, {"role": "system", "content": "Now be brief."}]},
        "[user]1+1?[system]Now be brief.[answer]",
    ),
    "neighbours of one role": (
        {"messages": [USER, USER, turn("assistant", text("a")), USER, USER]},
        "[user]1+1?\n1+1?[assistant]a[user]1+1?\n1+1?[answer]",
    ),
    "parallel calls": (
        {
            "messages": [
                USER,
                turn("assistant", text("Hm."), call("c1"), call("c2", 8)),
                turn("user", result("c1", content="2"), result("c2", content=[text("3")])),
            ]
        },
        "[user]1+1?[assistant]Hm.add=7add=8[tool]2<add:c1>[tool]3<add:c2>[answer]",
    ),
    "a result and a question": (
        {
            "messages": [
                USER,
                turn("assistant", call("c1")),
                turn("user", result("c1", content="2"), text("Why?")),
                turn("assistant", text("So.")),
                USER,
            ]
        },
        "[user]1+1?[assistant]add=7[tool]2<add:c1>[user]Why?[assistant]So.[user]1+1?[answer]",
    ),
    "a failed tool": (
        {
            "messages": [
                USER,
                turn("assistant", call("c1")),
                turn("user", result("c1", content="no disk", is_error=True)),
            ]
        },
        "[user]1+1?[assistant]add=7[tool]Error:\nno disk<add:c1>[answer]",
    ),
    "an empty result": (
        {"messages": [USER, turn("assistant", call("c1")), turn("user", result("c1"))]},
        "[user]1+1?[assistant]add=7[tool]<add:c1>[answer]",
    ),
    "thoughts": (
        {
            "messages": [
                USER,
                turn(
                    "assistant",
                    {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                    {"type": "redacted_thinking", "data": "x"},
                    text("a"),
                ),
                USER,
            ]
        },
        "[user]1+1?[assistant](Hm.)a[user]1+1?[answer]",
    ),
    "a beginning": (
        {"messages": [USER, turn("assistant", text("It is"))]},
        "[user]1+1?[assistant]It is",
    ),
    "no beginning": ({"messages": [USER, turn("assistant")]}, "[user]1+1?[assistant]"),
}


@pytest.mark.parametrize(("asked", "prompt"), CASES.values(), ids=CASES)
def test_what_reaches_the_model_is_what_is_counted(
    saying: Saying, prompt_of: Callable[[Any], str], asked: dict[str, Any], prompt: str
) -> None:
    live = saying("2")
    answer = live.post("/v1/messages", **ASKED | asked)
    assert answer.status_code == 200, answer.text
    assert prompt_of(live) == prompt
    counted = live.post("/v1/messages/count_tokens", **({"messages": [USER]} | asked)).json()
    assert counted["input_tokens"] == len(prompt)
    TypeAdapter(TokenCount).validate_python(counted)


def test_tools_are_counted_too(saying: Saying, client_of: Callable[[Any], Any]) -> None:
    live = saying("2")
    client = client_of(live)
    counted = client.messages.count_tokens(model="fake", messages=[USER], tools=[TOOL])
    client.messages.create(**ASKED, tools=[TOOL])
    [asked] = live.client.requests
    assert counted.input_tokens == len(asked.prompt_token_ids) > len("[user]1+1?[answer]")


def test_a_prompt_is_counted_even_if_it_does_not_fit(live: Any) -> None:
    long = {"role": "user", "content": "x" * 1000}
    counted = live.post("/v1/messages/count_tokens", messages=[long]).json()
    assert counted["input_tokens"] > live.client.info.max_model_len
    error = live.post("/v1/messages", max_tokens=1, messages=[long]).json()["error"]
    assert error["code"] == "context_length_exceeded"


def test_sampling_is_as_asked(saying: Saying) -> None:
    live = saying("2")
    asked = {
        "temperature": 0.25,
        "top_p": 0.5,
        "top_k": 3,
        "seed": 7,
        "min_p": 0.125,
        "stop_token_ids": [9],
        "cache_salt": "mine",
    }
    body = live.post("/v1/messages", **ASKED, **asked).json()
    assert body["octavo"]["warnings"] == []
    [request] = live.client.requests
    sampling = request.params
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.25, 0.5, 3)
    assert (sampling.seed, sampling.min_p, sampling.stop_token_ids) == (7, 0.125, (9,))
    assert (sampling.max_tokens, request.namespace) == (9, "0:mine")


@pytest.mark.parametrize(
    ("template", "asked", "variables", "warned"),
    [
        ("switched", {"thinking": {"type": "enabled"}}, "<think>", []),
        ("switched", {"thinking": {"type": "disabled"}}, "", []),
        (
            "switched",
            {"thinking": {"type": "enabled", "budget_tokens": 1024}},
            "<think>",
            ["thinking.budget_tokens"],
        ),
        ("switched", {"chat_template_kwargs": {"enable_thinking": True}}, "<think>", []),
        (
            "switched",
            {
                "thinking": {"type": "disabled"},
                "chat_template_kwargs": {"enable_thinking": True},
            },
            "<think>",
            [],
        ),
        ("thinking", {"thinking": {"type": "enabled"}}, "<think>", []),
        ("thinking", {"thinking": {"type": "disabled"}}, "<think>", ["thinking"]),
        ("thinking", {"thinking": {"type": "between_tools"}}, "<think>", ["thinking"]),
        ("hermes", {"thinking": {"type": "enabled"}}, "", ["thinking"]),
        ("hermes", {"thinking": {"type": "disabled"}}, "", []),
        ("hermes", {"thinking": {"type": "adaptive"}}, "", []),
        ("effort", {"output_config": {"effort": "high"}}, "high", []),
        ("hermes", {"output_config": {"effort": "high"}}, "", ["output_config.effort"]),
    ],
)
def test_thinking_is_the_templates_switch_if_it_has_one(
    saying: Saying,
    prompt_of: Callable[[Any], str],
    template: str,
    asked: dict[str, Any],
    variables: str,
    warned: list[str],
) -> None:
    live = saying("2", template)
    body = live.post("/v1/messages", **ASKED, **asked).json()
    assert prompt_of(live).partition("[answer]")[2].strip() == variables
    assert [warning["param"] for warning in body["octavo"]["warnings"]] == warned


def test_what_has_no_effect_is_told_by_its_own_name(saying: Saying) -> None:
    tool = TOOL | {"input_examples": [{}], "x": 1}
    asked = {
        "messages": [
            turn("user", text("a", citations=[{"x": 1}], y=2)),
            turn("assistant", call("c1"), {"type": "redacted_thinking", "data": "x"}),
            turn("user", result("c1", content=[text("b", z=3)])),
        ],
        "tools": [tool],
        "tool_choice": {"type": "auto", "q": 1},
        "metadata": {"user_id": "me", "team": "x"},
        "service_tier": "auto",
        "speed": "fast",
        "stop": ["x"],
    }
    body = saying("2").post("/v1/messages", **ASKED | asked).json()
    assert {warning["param"] for warning in body["octavo"]["warnings"]} == {
        "messages.0.content.0.citations",
        "messages.0.content.0.y",
        "messages.1.content.1",
        "messages.2.content.0.content.0.z",
        "tools.0.input_examples",
        "tools.0.x",
        "tool_choice.q",
        "metadata.user_id",
        "metadata.team",
        "speed",
        "stop",
    }
    for warning in body["octavo"]["warnings"]:
        assert warning["message"].startswith(warning["param"])


def test_a_flood_of_unknown_parameters_is_summed_up(saying: Saying) -> None:
    blocks = [text("a", x=1) for _ in range(100)]
    body = saying("2").post("/v1/messages", **ASKED | {"messages": [turn("user", *blocks)]}).json()
    warnings = body["octavo"]["warnings"]
    assert len(warnings) == chat_params.MAX_WARNINGS + 1
    assert "36 more" in warnings[-1]["message"]


def test_values_that_ask_for_nothing_are_no_trouble(saying: Saying) -> None:
    cache = {"type": "ephemeral", "ttl": "1h"}
    used = call("c1") | {"caller": {"type": "direct"}, "cache_control": cache}
    asked = {
        "cache_control": cache,
        "system": [text("a", cache_control=cache)],
        "messages": [
            turn("user", text("a", cache_control=None, citations=None)),
            turn("assistant", used),
            turn("user", result("c1", content=[text("b", cache_control=None)])),
        ],
        "tools": [TOOL | {"type": "custom", "cache_control": cache, "defer_loading": False}],
        "container": None,
        "mcp_servers": [],
        "service_tier": "standard_only",
        "temperature": 1,
    }
    body = saying("2").post("/v1/messages", **ASKED | asked).json()
    assert body["octavo"]["warnings"] == []


def test_the_clients_beta_api_works_too(saying: Saying, client_of: Callable[[Any], Any]) -> None:
    message = client_of(saying("2")).beta.messages.create(**ASKED, betas=["token-efficient-tools"])
    assert message.content[0].text == "2"


def test_null_is_the_default_of_every_field_that_has_one(live: Any) -> None:
    answer = live.post("/v1/messages", **dict.fromkeys(MessagesRequest.model_fields) | ASKED)
    assert answer.status_code == 200, answer.text


def test_names_are_honoured_passed_or_judged_but_only_one_of_it() -> None:
    fields = MessagesRequest.model_fields.keys()
    assert not fields & params.MESSAGES.keys()
    assert not fields & set(params.PASSED)
    assert not params.MESSAGES.keys() & set(params.PASSED)
    assert set(params.PASSED) <= SharedFields.model_fields.keys()
    for name, known in params.MESSAGES.items():
        [neutral, *_] = [*known.neutral, None]
        assert chat_params.judge({name: neutral}, params.MESSAGES) == []


def test_the_client_is_told_apart_by_nothing_it_sends_beside(
    saying: Saying, client_of: Callable[[Any], anthropic.Anthropic]
) -> None:
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "x,y"}
    client = client_of(saying("2"))
    assert client.messages.create(**ASKED, extra_headers=headers).content


def test_what_the_page_says_is_refused_or_warned_of_is(saying: Saying) -> None:
    live = saying("2")
    said = {"honoured": 0, "refused": 0, "warned": 0}
    for name, what, _ in api_table.message_entries():
        said[what] += 1
        if what == "honoured":
            continue
        answer = live.post("/v1/messages", **ASKED | {name: ["no", {"such": "value"}]})
        if what == "refused":
            error = answer.json()["error"]
            assert (error["param"], error["code"]) == (name, "unsupported_parameter")
        else:
            assert [entry["param"] for entry in answer.json()["octavo"]["warnings"]] == [name]
    assert all(said.values()), said
