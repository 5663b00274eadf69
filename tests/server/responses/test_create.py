"""Whole responses: the prompt, the JSON, and the official client's reading of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import Response as OpenAIResponse
from pydantic import TypeAdapter

from scheduler.client import FinishReason
from server.responses import response_models

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def test_the_official_client_reads_a_response(live: Any, api_of: Any) -> None:
    with api_of(live) as api:
        raw = api.responses.with_raw_response.create(
            model="fake", input="hello", max_output_tokens=5, metadata={"a": "b"}
        )
    TypeAdapter(response_models.ResponseBody).validate_json(raw.content)
    # The client itself checks nothing; its types do.
    OpenAIResponse.model_validate_json(raw.content)
    response = raw.parse()
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text
    assert response.metadata == {"a": "b"}
    usage = response.usage
    assert usage.output_tokens == 5
    assert usage.total_tokens == usage.input_tokens + 5
    assert usage.input_tokens_details.cached_tokens == 0
    assert response.to_dict()["octavo"]["warnings"] == []


def test_it_says_what_a_chat_says(live: Any) -> None:
    asked = {"temperature": 0, "seed": 3, "top_k": 4}
    chat = live.chat("hello", max_tokens=9, **asked).json()
    body = live.post(PATH, input="hello", max_output_tokens=9, **asked).json()
    [message] = body["output"]
    assert message["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert body["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert (body["temperature"], body["top_p"]) == (0, 1)


def test_instructions_come_first(speaking: Any, prompt_of: Any) -> None:
    live = speaking("yes")
    body = live.post(PATH, input="hi", instructions="Be brief.").json()
    assert prompt_of(live) == "[system]Be brief.[user]hi"
    assert body["instructions"] == "Be brief."
    assert body["status"] == "completed"
    assert body["completed_at"] >= body["created_at"]


def test_every_kind_of_item_reaches_the_template(speaking: Any, prompt_of: Any) -> None:
    live = speaking("yes")
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "1+1?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [_reasoning("Easy.")]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
        _call("c1", 7),
        _call("c2", 8),
        {"type": "function_call_output", "call_id": "c1", "output": "2"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "3"}],
        },
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant", "content": "Yes."},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
        },
    ]
    body = live.post(PATH, input=items).json()
    assert prompt_of(live) == (
        "[system]Be kind.[user]1+1?[assistant]Let me see.(Easy.)c1:7c2:8[tool]2c1[tool]3c2"
        "[assistant]No.[assistant]Yes.[user]a\nb"
    )
    assert body["octavo"]["warnings"] == []


def _reasoning(text: str) -> dict[str, str]:
    return {"type": "reasoning_text", "text": text}


def _call(call_id: str, a: int) -> dict[str, str]:
    arguments = json.dumps({"a": a})
    return {"type": "function_call", "call_id": call_id, "name": "add", "arguments": arguments}


def test_reasoning_that_cannot_be_used_is_told(speaking: Any, prompt_of: Any) -> None:
    live = speaking("yes")
    items = [
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gibberish"},
        {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "Hm"}]},
        {"role": "user", "content": "hi"},
    ]
    warnings = live.post(PATH, input=items).json()["octavo"]["warnings"]
    assert prompt_of(live) == "[user]hi"
    assert [warning["param"] for warning in warnings] == [
        "input.0.encrypted_content",
        "input.0",
        "input.1",
    ]


@pytest.mark.parametrize("width", [1, 7, 1000])
def test_reasoning_text_and_calls_are_items(speaking: Any, api_of: Any, width: int) -> None:
    output = f"One and one.\n</think>\n\nLet me see.\n{CALL}\n{CALL}"
    live = speaking(output, thinks=True, width=width)
    with api_of(live) as api:
        response = api.responses.create(model="fake", input="1+1?", tools=[TOOL])
    reasoning, message, first, second = response.output
    assert reasoning.content[0].text == "One and one."
    assert message.content[0].text == response.output_text == "Let me see."
    assert (first.name, json.loads(first.arguments)) == ("add", {"a": 1})
    assert first.call_id != second.call_id
    assert response.status == "completed"
    assert response.usage.output_tokens_details.reasoning_tokens == len("One and one.\n")


def test_an_answer_of_nothing_is_an_empty_message(speaking: Any) -> None:
    body = speaking("").post(PATH, input="x").json()
    [message] = body["output"]
    assert (message["content"][0]["text"], message["status"]) == ("", "completed")


@pytest.mark.parametrize("include_reasoning", [None, False])
def test_reasoning_may_be_left_out(speaking: Any, include_reasoning: bool | None) -> None:
    live = speaking("One.</think>Two.", thinks=True)
    body = live.post(PATH, input="x", include_reasoning=include_reasoning).json()
    kinds = [item["type"] for item in body["output"]]
    assert kinds == (["message"] if include_reasoning is False else ["reasoning", "message"])
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] == len("One.")


def test_without_parallel_calls_the_first_is_told(speaking: Any) -> None:
    asked = {"input": "1+1?", "tools": [TOOL], "parallel_tool_calls": False}
    body = speaking(CALL + CALL).post(PATH, **asked).json()
    assert [item["type"] for item in body["output"]] == ["function_call"]
    assert body["octavo"]["left_out"] == {"num_tool_calls": 1}
    assert body["parallel_tool_calls"] is False


def test_what_the_limit_cuts_is_incomplete(speaking: Any) -> None:
    live = speaking("Hm.\n" + CALL[:20], reason=FinishReason.LENGTH)
    body = live.post(PATH, input="1+1?", tools=[TOOL]).json()
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["octavo"]["left_out"] == {"cut_tool_call": CALL[:20]}
    assert body["output"][-1]["status"] == "incomplete"
    TypeAdapter(response_models.ResponseBody).validate_python(body)


@pytest.mark.parametrize("width", [1, 5])
def test_log_probabilities_are_those_of_the_text(speaking: Any, api_of: Any, width: int) -> None:
    live = speaking(f"Let me see.{CALL}", width=width)
    with api_of(live) as api:
        response = api.responses.create(
            model="fake", input="x", tools=[TOOL], include=["message.output_text.logprobs"]
        )
    content = response.output[0].content[0]
    assert "".join(entry.token for entry in content.logprobs).startswith(content.text)


@pytest.mark.parametrize("width", [1, 7, 1000])
def test_no_reasoning_is_among_the_log_probabilities(speaking: Any, width: int) -> None:
    live = speaking("One.</think>Two.", thinks=True, width=width)
    body = live.post(PATH, input="x", include=["message.output_text.logprobs"]).json()
    [part] = body["output"][1]["content"]
    assert "".join(entry["token"] for entry in part["logprobs"]) == "Two."


def test_what_a_prompt_is_too_long_for_may_be_cut(live: Any) -> None:
    long = "x" * 300
    error = live.post(PATH, input=long).json()["error"]
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
    assert "messages" not in error["message"]
    body = live.post(PATH, input=long, truncation="auto").json()
    assert body["usage"]["input_tokens"] == 256 - 16
    assert body["truncation"] == "auto"


def test_what_is_not_honoured_is_told(live: Any) -> None:
    asked = {
        "user": "me",
        "service_tier": "flex",
        "tempurature": 1,
        "max_tool_calls": 3,
        "reasoning": {"summary": "auto", "shape": 1},
        "text": {"shape": 1, "format": {"type": "text", "shape": 1}},
        "include": ["reasoning.encrypted_content", "file_search_call.results"],
        "stream": False,
    }
    item = {"role": "user", "content": [{"type": "input_text", "text": "x", "shape": 1}], "mood": 1}
    body = live.post(PATH, input=[item, item], max_output_tokens=1, **asked).json()
    assert {warning["param"] for warning in body["octavo"]["warnings"]} == {
        "user",
        "service_tier",
        "tempurature",
        "max_tool_calls",
        "reasoning.summary",
        "reasoning.shape",
        "text.shape",
        "text.format.shape",
        "include.0",
        "include.1",
        "input.0.mood",
        "input.0.content.0.shape",
    }


def test_what_asks_for_nothing_is_no_trouble(live: Any) -> None:
    asked: dict[str, Any] = {
        "background": False,
        "conversation": None,
        "context_management": [],
        "tool_choice": "auto",
        "tools": [],
        "text": {"format": {"type": "text"}},
        "reasoning": {},
        "include": [],
        "top_logprobs": 0,
        "truncation": "disabled",
        "service_tier": "auto",
        "n": 1,
        "metadata": {},
    }
    body = live.post(PATH, input="x", max_output_tokens=1, **asked).json()
    assert body["octavo"]["warnings"] == []


def test_what_a_chat_warns_of_is_named_as_here(live: Any) -> None:
    asked = {"reasoning": {"effort": "high"}, "text": {"verbosity": "low"}, "max_output_tokens": 1}
    warnings = live.post(PATH, input="x", **asked).json()["octavo"]["warnings"]
    names = {warning["param"] for warning in warnings}
    assert not names & {"reasoning_effort", "verbosity"}
    assert all(warning["message"].startswith(warning["param"]) for warning in warnings)
