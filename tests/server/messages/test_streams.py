"""Streams of `POST /v1/messages`: they add up to the whole answer for all cuts of the output."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import anthropic
import httpx
import pytest
from pydantic import TypeAdapter

from event_streams import events_of
from scheduler.client import EngineUnavailableError, FinishReason, GenerateRequest, TokenOutput
from server.messages.blocks import Blocks, summed
from server.messages.response_models import MessageEvent

USER: Any = {"role": "user", "content": "1+1?"}
TOOL: Any = {"name": "add", "input_schema": {"type": "object"}}
ASKED: dict[str, Any] = {"model": "fake", "max_tokens": 99, "messages": [USER], "tools": [TOOL]}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
#: By name: the template and the output of the model.
OUTPUTS = {
    "nothing": ("hermes", ""),
    "text": ("hermes", "Two, of course."),
    "call": ("hermes", CALL),
    "text-calls": ("hermes", f"Let me see.\n{CALL}\n{CALL}"),
    "calls-text": ("hermes", f"{CALL}\n{CALL}\nThat is it."),
    "text-call-text-call": ("hermes", f"One:\n{CALL}\nTwo:\n{CALL}"),
    "thoughts": ("thinking", "Hm, well, hm"),
    "thoughts-text": ("thinking", "Hm.</think>\n\nTwo."),
    "thoughts-calls-text": ("thinking", f"Hm.</think>{CALL}{CALL}\nThere."),
    "thoughts-text-call": ("thinking", f"Hm.</think>Wait.\n{CALL}"),
}

Saying = Callable[..., Any]


def documented_events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """Return each event's payload, as it is documented."""
    found = events_of(answer.content)
    for payload in found:
        TypeAdapter(MessageEvent).validate_python(payload)
    return found


def require_order(events: list[dict[str, Any]]) -> None:
    """Require blocks one after another, each begun, filled and ended, within the message."""
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "ping"]
    assert kinds[-2:] == ["message_delta", "message_stop"]
    index, is_open = -1, False
    for event in events[2:-2]:
        match event["type"]:
            case "content_block_start":
                assert not is_open
                index, is_open = index + 1, True
            case "content_block_stop":
                assert is_open
                is_open = False
            case kind:
                assert (kind, is_open) == ("content_block_delta", True)
        assert event["index"] == index
    assert not is_open


@pytest.mark.parametrize("width", [1, 7, 1000])
@pytest.mark.parametrize(("template", "output"), OUTPUTS.values(), ids=OUTPUTS)
def test_a_stream_adds_up_to_the_whole_answer(
    saying: Saying, client_of: Callable[[Any], Any], template: str, output: str, width: int
) -> None:
    live = saying(output, template, width=width)
    whole = live.post("/v1/messages", **ASKED).json()
    events = documented_events_of(live.post("/v1/messages", **ASKED, stream=True))
    require_order(events)
    with client_of(live).messages.stream(**ASKED) as stream:
        message = stream.get_final_message()

    def shown(block: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in block.items() if k != "id" and v is not None}

    assert [shown(block) for block in whole["content"]] == [
        shown(block.to_dict()) for block in message.content
    ]
    assert message.stop_reason == whole["stop_reason"]
    assert message.usage.to_dict().items() >= whole["usage"].items()


def test_arguments_come_as_they_are_written(saying: Saying) -> None:
    events = events_of(saying(CALL).post("/v1/messages", **ASKED, stream=True).content)
    block, *deltas, end = events[2:-2]
    assert block["content_block"] | {"id": ""} == {
        "type": "tool_use",
        "id": "",
        "name": "add",
        "input": {},
    }
    written = [event["delta"]["partial_json"] for event in deltas]
    assert written == ["{", '"', "a", '"', ":", " ", "1}"]
    assert end["type"] == "content_block_stop"


@pytest.mark.parametrize(
    ("written", "shown"),
    [("", {}), ('"a": [1, {"b": "x', {"a": [1, {}]}), ('"a": 1, "b', {"a": 1})],
)
def test_a_call_that_the_limit_cuts_keeps_its_complete_members(
    saying: Saying, client_of: Callable[[Any], Any], written: str, shown: dict[str, Any]
) -> None:
    output = CALL + '<tool_call>{"name": "add", "arguments": {' + written
    live = saying(output, reason=FinishReason.LENGTH)
    body = live.post("/v1/messages", **ASKED).json()
    assert [block["input"] for block in body["content"]] == [{"a": 1}, shown]
    assert body["stop_reason"] == "max_tokens"
    assert body["octavo"]["left_out"] == {"cut_tool_call": ""}
    events = events_of(live.post("/v1/messages", **ASKED, stream=True).content)
    require_order(events)
    added = [event["delta"].get("partial_json", "") for event in events if "delta" in event]
    assert "".join(added) == '{"a": 1}{' + written
    with client_of(live).messages.stream(**ASKED) as stream:
        message = stream.get_final_message()
    assert [block.name for block in message.content] == ["add", "add"]


def test_blocks_are_the_sum_of_their_events_without_a_server() -> None:
    blocks = Blocks(None, lambda: "id")
    told = []
    for text in ("a", "", "b"):
        told += blocks.push(text)
        blocks.check()
    assert summed([*told, *blocks.finish()]) == [{"type": "text", "text": "ab"}]
    blocks.check()


def test_the_text_is_streamed(live: Any, client_of: Callable[[Any], Any]) -> None:
    asked = ASKED | {"tools": [], "max_tokens": 20}
    with client_of(live).messages.stream(**asked, extra_body={"ignore_eos": True}) as stream:
        texts = list(stream.text_stream)
    assert len(texts) > 1
    whole = live.post("/v1/messages", **asked, ignore_eos=True).json()
    assert "".join(texts) == whole["content"][0]["text"]


def test_the_start_tells_what_was_in_the_cache(saying: Saying) -> None:
    events = documented_events_of(saying("Two").post("/v1/messages", **ASKED, stream=True))
    start, end = events[0]["message"]["usage"], events[-2]["usage"]
    assert start["cache_read_input_tokens"] == 5
    assert start | {"output_tokens": 3} == end
    assert events[-2]["octavo"]["cache"]["reused_tokens"] == 5


def test_the_asynchronous_client_reads_it_too(saying: Saying) -> None:
    live = saying(f"Let me see.\n{CALL}", width=3)

    async def ask() -> tuple[str, Any]:
        async with (
            anthropic.AsyncAnthropic(base_url=live.url, api_key="none", max_retries=0) as client,
            client.messages.stream(**ASKED) as stream,
        ):
            text = "".join([part async for part in stream.text_stream])
            return text, await stream.get_final_message()

    text, message = asyncio.run(ask())
    assert text == "Let me see."
    assert message.content[-1].input == {"a": 1}
    assert message.stop_reason == "tool_use"


@pytest.mark.parametrize("is_typed", [False, True], ids=["any", "engine"])
def test_a_failure_on_the_way_is_an_event_of_its_own(
    scripted: Callable[..., Any], client_of: Callable[[Any], Any], is_typed: bool
) -> None:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        yield TokenOutput(tuple(b"Tw"))
        if is_typed:
            raise EngineUnavailableError("the engine is gone")
        yield TokenOutput(finish_reason=FinishReason.ERROR if request.prompt_token_ids else None)

    live = scripted(script)
    asked = ASKED | {"tools": []}
    events = documented_events_of(live.post("/v1/messages", **asked, stream=True))
    assert [event["type"] for event in events][-2:] == ["content_block_delta", "error"]
    error = events[-1]["error"]
    assert error["type"] == ("overloaded_error" if is_typed else "api_error")
    with (
        pytest.raises(anthropic.APIStatusError, match=error["message"]),
        client_of(live).messages.stream(**asked) as stream,
    ):
        stream.until_done()
