"""`cache_control` through the real scheduler: pins, usage, refusals, and the types of Anthropic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, MessageDeltaUsage

from event_streams import events_of
from model.fake import FakeRunner
from server.messages.schemas import MessagesRequest
from server.messages.spec import conversation_of

PAGE = 4
SYSTEM = "You are a helpful assistant, and brief in all that you write."
CACHED: Any = {"type": "ephemeral"}
HOUR: Any = {"type": "ephemeral", "ttl": "1h"}


@pytest.fixture
def live(start_server: Callable[..., Any]) -> Any:
    """A server with room for some prompts."""
    runner = FakeRunner(vocab_size=300, num_pages=256, max_model_len=512)
    return start_server(runner=runner, dev_endpoints=True)


@pytest.fixture(scope="module")
def shared_live(start_shared: Callable[..., Any]) -> Any:
    """One for tests of errors and types, and for tests with a salt of their own."""
    return start_shared(runner=FakeRunner(vocab_size=300, num_pages=256, max_model_len=512))


def block(text: str, control: Any = None) -> dict[str, Any]:
    return {"type": "text", "text": text} | ({} if control is None else {"cache_control": control})


def message(live: Any, *blocks: Any, **more: Any) -> dict[str, Any]:
    asked = {"max_tokens": 3, "messages": [{"role": "user", "content": [*blocks]}], **more}
    answer = live.post("/v1/messages", ignore_eos=True, **asked)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def num_pinned(live: Any, lifetime: str) -> float:
    found: float = live.metric(f'octavo_kv_pinned_pages{{lifetime="{lifetime}"}}')
    return found


def test_a_block_is_pinned_and_counted_as_written_then_as_read(live: Any) -> None:
    usage = message(live, block("Hello!"), system=[block(SYSTEM, HOUR)])["usage"]
    head = len("<|im_start|>system\n" + SYSTEM)
    assert usage["cache_creation_input_tokens"] == head
    assert usage["cache_creation"] == {
        "ephemeral_5m_input_tokens": 0,
        "ephemeral_1h_input_tokens": head,
    }
    assert num_pinned(live, "1h") == -(-head // PAGE)
    again = message(live, block("Bye!"), system=[block(SYSTEM, HOUR)])["usage"]
    assert again["cache_read_input_tokens"] >= head
    assert again["cache_creation_input_tokens"] == 0


def test_the_written_tokens_are_split_by_lifetime(live: Any) -> None:
    system = [block(SYSTEM, HOUR)]
    usage = message(live, block("Hello!", CACHED), block("And?"), system=system)["usage"]
    by_lifetime = usage["cache_creation"]
    assert by_lifetime["ephemeral_1h_input_tokens"] == len("<|im_start|>system\n" + SYSTEM)
    between = "<|im_end|>\n<|im_start|>user\nHello!"
    assert by_lifetime["ephemeral_5m_input_tokens"] == len(between)
    assert usage["cache_creation_input_tokens"] == sum(by_lifetime.values())


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"cache_control": CACHED},
        {"system": [block(SYSTEM, HOUR)], "cache_control": CACHED},
        {"system": [block(SYSTEM, HOUR)]},
    ],
)
def test_the_input_tokens_of_a_message_are_the_prompt(
    shared_live: Any, more: dict[str, Any], is_warm: bool, is_stream: bool
) -> None:
    salt = f"{sorted(more)} {is_warm} {is_stream}"
    content = [block("x" * 30)]
    asked = {
        "max_tokens": 3,
        "messages": [{"role": "user", "content": content}],
        "cache_salt": salt,
        **more,
    }
    count = shared_live.post("/v1/messages/count_tokens", **asked).json()["input_tokens"]
    if is_warm:
        shared_live.post("/v1/messages", **asked)
    answer = shared_live.post("/v1/messages", stream=is_stream, ignore_eos=True, **asked)
    usages = [answer.json()["usage"]] if not is_stream else []
    for event in events_of(answer.content) if is_stream else []:
        if event["type"] == "message_start":
            usages.append(event["message"]["usage"])
        elif event["type"] == "message_delta":
            usages.append(event["usage"])
            MessageDeltaUsage.model_validate(event["usage"], strict=True)
    assert len(usages) == 1 + is_stream
    for usage in usages:
        names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
        assert sum(usage[name] for name in names) == count
        created = usage["cache_creation"]
        assert sum(created.values()) == usage["cache_creation_input_tokens"]


def test_anthropics_types_read_every_field(shared_live: Any) -> None:
    with anthropic.Anthropic(base_url=shared_live.url, api_key="none", max_retries=0) as client:
        answer: Message = client.messages.create(
            model="fake",
            max_tokens=3,
            cache_control={"type": "ephemeral", "ttl": "1h"},
            messages=[{"role": "user", "content": SYSTEM}],
        )
    usage = answer.usage
    assert usage.cache_creation is not None
    assert usage.cache_creation.ephemeral_1h_input_tokens == usage.cache_creation_input_tokens
    assert (usage.cache_creation_input_tokens or 0) > len(SYSTEM)
    assert usage.cache_creation.ephemeral_5m_input_tokens == 0


def test_prewarming_writes_the_prompt_and_no_answer(live: Any) -> None:
    body = message(live, block(SYSTEM, CACHED), max_tokens=0)
    assert (body["content"], body["stop_reason"]) == ([], "max_tokens")
    assert body["usage"]["output_tokens"] == 0
    assert body["usage"]["cache_creation_input_tokens"] > len(SYSTEM)
    assert num_pinned(live, "5m") > len(SYSTEM) // PAGE
    again = message(live, block(SYSTEM, CACHED), block("Now?"))
    assert again["usage"]["cache_read_input_tokens"] > len(SYSTEM)


def fifth(controls: list[Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [block("a", one) for one in controls]}]}


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        (fifth([CACHED] * 5), "messages.0.content.4.cache_control", "maximum of 4 blocks"),
        (
            fifth([CACHED] * 4 + [None]) | {"cache_control": CACHED},
            "cache_control",
            "maximum of 4 blocks with cache_control may be provided. Found 5.",
        ),
        (
            fifth([CACHED, HOUR]),
            "messages.0.content.1.cache_control.ttl",
            "must not come after a ttl='5m'",
        ),
        (
            fifth([HOUR]) | {"tools": [{"name": "f", "input_schema": {}, "cache_control": CACHED}]},
            "messages.0.content.0.cache_control.ttl",
            "`tools`, `system`, `messages`",
        ),
        (fifth([HOUR]) | {"cache_control": CACHED}, "cache_control", "another ttl"),
        (fifth([{"type": "ephemeral", "ttl": "2h"}]), "messages.0.content.0.cache_control.ttl", ""),
        (fifth([None]) | {"max_tokens": 0, "stream": True}, "stream", "max_tokens 0"),
        (
            fifth([None]) | {"max_tokens": 0, "thinking": {"type": "enabled", "budget_tokens": 9}},
            "thinking",
            "max_tokens 0",
        ),
        (fifth([None]) | {"max_tokens": -1}, "max_tokens", ""),
    ],
)
def test_wrong_breakpoints_are_refused_as_by_anthropic(
    shared_live: Any, asked: dict[str, Any], param: str, words: str
) -> None:
    answer = shared_live.post("/v1/messages", **{"max_tokens": 3} | asked)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]


def test_four_breakpoints_and_one_twice_are_allowed(shared_live: Any) -> None:
    asked = fifth([HOUR, CACHED, CACHED, CACHED]) | {"cache_control": CACHED, "max_tokens": 3}
    assert shared_live.post("/v1/messages", **asked).status_code == 200


def test_results_and_calls_can_end_with_a_breakpoint() -> None:
    asked = {
        "max_tokens": 3,
        "messages": [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "b"},
                    {
                        "type": "tool_use",
                        "id": "1",
                        "name": "f",
                        "input": {},
                        "cache_control": CACHED,
                    },
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "1",
                        "is_error": True,
                        "content": [block("c", CACHED), block("d")],
                        "cache_control": CACHED,
                    },
                    block("e"),
                ],
            },
        ],
    }
    chat, _ = conversation_of(MessagesRequest.model_validate(asked), None)
    places = [(one.message, one.part, one.call) for one in chat.caching.breakpoints]
    assert places == [(1, -1, 0), (2, 1, None), (2, -1, None)]
