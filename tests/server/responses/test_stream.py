"""Streamed responses: every event in its place, and the last equal to the stored response."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response as OpenAIResponse

from scheduler.client import EngineFaultError, FinishReason, GenerateRequest, TokenOutput
from waiting import TIMEOUT_S

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
MIXED = f"One and one.</think>Let me see.{CALL}And again:{CALL}{CALL}"


def test_events_come_in_order(live: Any, events_of: Any) -> None:
    answer = live.post(PATH, input="x", stream=True, max_output_tokens=3)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = events_of(answer.text)
    assert [kind for kind, _ in itertools.groupby(event["type"] for event in events)] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[-1]["response"]["status"] == "incomplete"
    text = "".join(event.get("delta", "") for event in events)
    assert text == events[-1]["response"]["output"][0]["content"][0]["text"]


@pytest.mark.parametrize("width", [1, 4, 1000])
def test_a_mixture_adds_up_event_by_event(speaking: Any, events_of: Any, width: int) -> None:
    live = speaking(MIXED, thinks=True, width=width)
    asked = {"input": "1+1?", "tools": [TOOL], "include": ["message.output_text.logprobs"]}
    events = events_of(live.post(PATH, stream=True, **asked).text)
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == [
        "reasoning",
        "message",
        "function_call",
        "message",
        "function_call",
        "function_call",
    ]
    assert _accumulated(events) == output
    whole = speaking(MIXED, thinks=True).post(PATH, **asked).json()
    assert [_plain(item) for item in whole["output"]] == [_plain(item) for item in output]


def _accumulated(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Build the items as a client does, and check the place of each event."""
    items: list[dict[str, Any]] = []
    done: list[dict[str, Any]] = []
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items) == len(done)
            assert event["item"]["status"] == "in_progress"
            items.append(event["item"])
            continue
        item = items[event["output_index"]]
        if kind == "output_item.done":
            assert event["item"] == item | {"status": "completed"}
            done.append(event["item"])
            continue
        assert event["item_id"] == item["id"]
        if kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == item["arguments"]
        elif kind == "content_part.added":
            item["content"].append(event["part"])
        elif kind.endswith("_text.delta"):
            part = item["content"][event["content_index"]]
            part["text"] += event["delta"]
            part.get("logprobs", []).extend(event.get("logprobs", []))
        elif kind.endswith("_text.done"):
            assert event["text"] == item["content"][0]["text"]
        else:
            assert kind == "content_part.done"
            assert event["part"] == item["content"][0]
    return done


def _plain(item: dict[str, Any]) -> tuple[Any, ...]:
    words = [(part["type"], part["text"]) for part in item.get("content", [])]
    return item["type"], item.get("arguments"), words


def test_arguments_come_as_they_are_written(speaking: Any, events_of: Any) -> None:
    events = events_of(speaking(CALL).post(PATH, stream=True, input="x", tools=[TOOL]).text)
    kinds = [event["type"].removeprefix("response.") for event in events]
    [first, *_, last] = [i for i, k in enumerate(kinds) if k == "function_call_arguments.delta"]
    assert events[first - 1]["item"] | {"id": "", "call_id": ""} == {
        "id": "",
        "call_id": "",
        "type": "function_call",
        "name": "add",
        "arguments": "",
        "status": "in_progress",
    }
    assert len({*kinds[first : last + 1]}) == 1
    assert [event["delta"] for event in events[first : last + 1]] == [
        "{",
        '"',
        "a",
        '"',
        ":",
        " ",
        "1}",
    ]
    assert kinds[last + 1 : last + 3] == ["function_call_arguments.done", "output_item.done"]
    assert events[last + 1]["arguments"] == '{"a": 1}'


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_call_that_the_limit_cuts_is_an_incomplete_item(
    speaking: Any, events_of: Any, is_stream: bool
) -> None:
    live = speaking(CALL + CALL[:-18], reason=FinishReason.LENGTH)
    answer = live.post(PATH, input="1+1?", tools=[TOOL], stream=is_stream)
    body = events_of(answer.text)[-1]["response"] if is_stream else answer.json()
    OpenAIResponse.model_validate(body)
    assert [(item["arguments"], item["status"]) for item in body["output"]] == [
        ('{"a": 1}', "completed"),
        ('{"a"', "incomplete"),
    ]
    assert body["status"] == "incomplete"
    assert body["octavo"]["left_out"] == {"cut_tool_call": ""}
    if is_stream:
        *_, last, _ = events_of(answer.text)
        assert (last["type"], last["item"]) == ("response.output_item.done", body["output"][-1])


@pytest.mark.parametrize("width", [1, 9])
def test_the_official_clients_helper_gives_what_is_stored(
    speaking: Any, api_of: Any, width: int
) -> None:
    live = speaking(MIXED, thinks=True, width=width)
    with api_of(live) as api:
        with api.responses.stream(model="fake", input="1+1?", tools=[TOOL]) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        stored = api.responses.retrieve(final.id)
    assert kinds[-1] == "response.completed"
    OpenAIResponse.model_validate(final.to_dict())
    assert final.output_text == "Let me see.And again:"
    assert _without_parsed(final.to_dict()) == stored.to_dict()
    assert final.to_dict()["octavo"]["cache"]["reused_tokens"] == 0


def _without_parsed(value: Any) -> Any:
    """Remove the fields that the helper itself adds."""
    if isinstance(value, dict):
        kept = value.items()
        return {k: _without_parsed(v) for k, v in kept if k not in {"parsed", "parsed_arguments"}}
    return [_without_parsed(item) for item in value] if isinstance(value, list) else value


def test_a_stream_may_be_told_not_to_pad(live: Any, api_of: Any) -> None:
    with api_of(live) as api:
        *_, last = api.responses.create(
            model="fake",
            input="x",
            stream=True,
            max_output_tokens=2,
            stream_options={"include_obfuscation": False},
        )
    assert last.type == "response.incomplete"
    assert last.response.to_dict()["octavo"]["warnings"] == []


@pytest.fixture
def failing(scripted: Callable[..., Any]) -> Any:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        assert request.prompt_token_ids
        yield TokenOutput(tuple(b"half "))
        raise EngineFaultError("the engine fell")

    return scripted(script)


def test_a_stream_that_fails_says_so_in_events(failing: Any, events_of: Any) -> None:
    events = events_of(failing.post(PATH, input="x", stream=True).text)
    failed, error = events[-2:]
    assert failed["type"] == "response.failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "the engine fell"}
    assert failed["response"]["output"][0]["content"][0]["text"] == "half "
    assert error["type"] == "error"
    assert error["message"] == error["error"]["message"] == "the engine fell"
    name = failed["response"]["id"]
    assert failing.http.get(f"{PATH}/{name}").status_code == 404


def test_the_official_client_raises_at_a_failure(failing: Any, api_of: Any) -> None:
    with api_of(failing) as api:
        stream = api.responses.create(model="fake", input="x", stream=True)
        while next(stream).type != "response.failed":
            pass
        with pytest.raises(openai.APIError, match="the engine fell"):
            next(stream)


def test_a_failure_before_the_first_event_is_a_status(
    scripted: Callable[..., Any],
) -> None:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        if request.prompt_token_ids:
            raise EngineFaultError("the engine fell")
        yield TokenOutput()

    answer = scripted(script).post(PATH, input="x", stream=True)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "engine_fault"


def test_a_client_that_leaves_ends_it_and_nothing_is_kept(scripted: Callable[..., Any]) -> None:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        assert request.prompt_token_ids
        for token in itertools.count():
            yield TokenOutput((65 + token % 26,))
            # Nothing waits here for its reader: others must get their turn.
            await _turn()
        yield TokenOutput(finish_reason=FinishReason.STOP)

    live = scripted(script)
    body = {"input": "x", "stream": True}
    with httpx.stream("POST", live.url + PATH, json=body, timeout=TIMEOUT_S) as answer:
        for line in answer.iter_lines():
            if "output_text.delta" in line:
                break
    assert live.client.was_closed.wait(TIMEOUT_S)
    live.wait_idle()
    assert live.metric("octavo_stored_responses") == 0


async def _turn() -> None:
    import asyncio  # noqa: PLC0415 - only here

    await asyncio.sleep(0)
