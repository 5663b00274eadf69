"""Whole answers of `POST /v1/messages`, with Anthropic's own client."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import anthropic
import pytest
from pydantic import TypeAdapter

from event_streams import events_of
from scheduler.client import FinishReason
from server.messages import response_models

USER: Any = {"role": "user", "content": "1+1?"}
TOOL: Any = {
    "name": "add",
    "description": "Adds.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TWO_CALLS = f"Let me see.\n{CALL}\n{CALL}"
ASKED: dict[str, Any] = {"model": "fake", "max_tokens": 99, "messages": [USER]}

Saying = Callable[..., Any]
ClientOf = Callable[[Any], anthropic.Anthropic]


def test_a_message_is_as_the_client_and_the_document_say(
    saying: Saying, client_of: ClientOf
) -> None:
    live = saying("Two.")
    raw = client_of(live).messages.with_raw_response.create(**ASKED)
    TypeAdapter(response_models.MessageAnswer).validate_json(raw.read())
    message = raw.parse()
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.model) == ("message", "assistant", "fake")
    [block] = message.content
    assert (block.type, block.text) == ("text", "Two.")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.output_tokens == 4
    assert raw.headers["request-id"] == raw.headers["x-request-id"]
    octavo = json.loads(raw.read())["octavo"]
    assert octavo["warnings"] == []
    assert octavo["cache"]["reused_tokens"] == 5


def test_the_three_kinds_of_input_tokens_are_the_prompt(saying: Saying) -> None:
    live = saying("Two.")
    usage = live.post("/v1/messages", **ASKED).json()["usage"]
    [asked] = live.client.requests
    num_prompt, page_size = len(asked.prompt_token_ids), live.client.info.page_size
    assert page_size > 1
    assert usage["cache_read_input_tokens"] == 5
    assert usage["cache_creation_input_tokens"] == num_prompt // page_size * page_size - 5
    assert usage["input_tokens"] == num_prompt % page_size


def test_a_prompt_asked_again_is_read_from_the_cache(live: Any, client_of: ClientOf) -> None:
    client = client_of(live)
    asked = ASKED | {"max_tokens": 1, "messages": [USER | {"content": "x" * 40}]}
    first, second = (client.messages.create(**asked).usage for _ in range(2))
    total = client.messages.count_tokens(model="fake", messages=asked["messages"]).input_tokens
    for usage in (first, second):
        read, created = usage.cache_read_input_tokens, usage.cache_creation_input_tokens
        assert read is not None
        assert created is not None
        assert usage.input_tokens + read + created == total
    page_size = live.client.info.page_size
    assert first.cache_read_input_tokens == 0
    assert first.cache_creation_input_tokens == total // page_size * page_size
    assert second.cache_read_input_tokens == first.cache_creation_input_tokens
    assert second.cache_creation_input_tokens == 0


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("stop", "said"), [(["END", "two"], "One, "), (["two", "END"], "One, ")])
def test_the_stop_sequence_that_matched_is_told(
    saying: Saying, is_stream: bool, stop: list[str], said: str
) -> None:
    live = saying("One, two, END")
    answer = live.post("/v1/messages", **ASKED, stop_sequences=stop, stream=is_stream)
    if is_stream:
        events = events_of(answer.content)
        end = events[-2]["delta"]
        text = "".join(event.get("delta", {}).get("text", "") for event in events)
    else:
        end = answer.json()
        text = end["content"][0]["text"]
    assert (end["stop_reason"], end["stop_sequence"]) == ("stop_sequence", "two")
    assert text == said


def test_a_stop_sequence_that_ends_the_output_and_shows_nothing(saying: Saying) -> None:
    body = saying("END", width=3).post("/v1/messages", **ASKED, stop_sequences=["END"]).json()
    assert body["content"] == []
    assert body["stop_sequence"] == "END"


def test_the_limit_is_told_of(live: Any) -> None:
    body = live.post("/v1/messages", **ASKED | {"max_tokens": 3}, ignore_eos=True).json()
    assert body["stop_reason"] == "max_tokens"
    assert body["usage"]["output_tokens"] == 3
    assert body["octavo"]["warnings"] == []


def test_what_the_context_has_no_room_for_is_cut_and_told_of(live: Any) -> None:
    body = live.post("/v1/messages", **ASKED | {"max_tokens": 32_000}, ignore_eos=True).json()
    usage = body["usage"]
    assert body["stop_reason"] == "model_context_window_exceeded"
    del usage["cache_creation"]
    assert sum(usage.values()) == live.client.info.max_model_len
    [warning] = body["octavo"]["warnings"]
    assert warning["param"] == "max_tokens"
    assert str(usage["output_tokens"]) in warning["message"]


def test_calls_are_blocks_of_their_own(saying: Saying, client_of: ClientOf) -> None:
    message = client_of(saying(TWO_CALLS)).messages.create(**ASKED, tools=[TOOL])
    text, *calls = message.content
    assert (text.type, text.text) == ("text", "Let me see.")
    assert [(call.type, call.name, call.input) for call in calls] == [
        ("tool_use", "add", {"a": 1})
    ] * 2
    assert len({call.id for call in calls}) == 2
    assert all(call.id.startswith("toolu_") for call in calls)
    assert message.stop_reason == "tool_use"


def test_a_round_trip_of_a_tool(
    saying: Saying, client_of: ClientOf, prompt_of: Callable[[Any], str]
) -> None:
    live = saying(CALL)
    client = client_of(live)
    message = client.messages.create(**ASKED, tools=[TOOL])
    [call] = message.content
    assert call.type == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "2"}
    turns = [USER, message.to_param(), {"role": "user", "content": [result]}]
    client.messages.create(model="fake", max_tokens=9, messages=turns, tools=[TOOL])
    assert prompt_of(live).endswith(f"[user]1+1?[assistant]add=1[tool]2<add:{call.id}>[answer]")
    assert '"description": "Adds."' in prompt_of(live)
    assert '"parameters": {"type": "object"' in prompt_of(live)


def test_numbers_no_client_can_hold_do_no_harm(saying: Saying) -> None:
    number = "9" * 5000
    output = '<tool_call>{"name": "add", "arguments": {"a": ' + number + "}}</tool_call>"
    answer = saying(output, width=1000).post("/v1/messages", **ASKED, tools=[TOOL])
    assert f'"input":{{"a": {number}}}' in answer.text


def test_only_one_call_if_that_is_wanted(saying: Saying) -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    live = saying(TWO_CALLS)
    body = live.post("/v1/messages", **ASKED, tools=[TOOL], tool_choice=choice).json()
    assert [block["type"] for block in body["content"]] == ["text", "tool_use"]
    assert body["octavo"]["left_out"] == {"num_tool_calls": 1}
    TypeAdapter(response_models.MessageAnswer).validate_python(body)


def test_a_call_cut_by_the_limit_is_told_apart(saying: Saying) -> None:
    live = saying("Hm.\n" + CALL[:20], reason=FinishReason.LENGTH)
    body = live.post("/v1/messages", **ASKED | {"max_tokens": 30}, tools=[TOOL]).json()
    assert body["content"] == [{"type": "text", "text": "Hm."}]
    assert body["stop_reason"] == "max_tokens"
    assert body["octavo"]["left_out"] == {"cut_tool_call": CALL[:20]}


def test_tool_choice_none_hides_the_tools(saying: Saying, prompt_of: Callable[[Any], str]) -> None:
    live = saying(CALL)
    body = live.post("/v1/messages", **ASKED, tools=[TOOL], tool_choice={"type": "none"}).json()
    assert body["content"] == [{"type": "text", "text": CALL}]
    assert "add" not in prompt_of(live)


def test_ids_are_such_as_the_template_insists_on(saying: Saying) -> None:
    live = saying('[TOOL_CALLS]add[ARGS]{"a": 1}', "mistral")
    [block] = live.post("/v1/messages", **ASKED, tools=[TOOL]).json()["content"]
    assert len(block["id"]) == 9


def test_thoughts_are_blocks_that_can_be_sent_back(
    saying: Saying, client_of: ClientOf, prompt_of: Callable[[Any], str]
) -> None:
    live = saying("One and one.\n</think>\n\nTwo.", "thinking")
    client = client_of(live)
    message = client.messages.create(**ASKED)
    thinking, text = message.content
    assert (thinking.type, thinking.thinking) == ("thinking", "One and one.")
    assert (text.type, text.text) == ("text", "Two.")
    client.messages.create(model="fake", max_tokens=9, messages=[USER, message.to_param(), USER])
    assert "[assistant](One and one.)Two.[user]" in prompt_of(live)


def test_thoughts_may_be_omitted(saying: Saying) -> None:
    live = saying("One.</think>Two.", "thinking")
    thinking = {"type": "adaptive", "display": "omitted"}
    body = live.post("/v1/messages", **ASKED, thinking=thinking).json()
    assert body["content"] == [
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "text", "text": "Two."},
    ]


def test_an_answer_goes_on_with_the_last_message(
    saying: Saying, prompt_of: Callable[[Any], str]
) -> None:
    live = saying(" and so on")
    prefill = {"role": "assistant", "content": "It is two"}
    body = live.post("/v1/messages", **ASKED | {"messages": [USER, prefill]}).json()
    assert prompt_of(live) == "[user]1+1?[assistant]It is two"
    assert body["content"][0]["text"] == " and so on"
