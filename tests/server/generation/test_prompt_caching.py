"""OpenAI's prompt caching through the real scheduler: pins, usage, refusals, and its types."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from openai.types import CompletionUsage
from openai.types.responses import Response

from event_streams import chunks_of
from model.fake import FakeRunner
from scheduler.client import FinishReason, PrefixPin, TokenOutput

PAGE = 4
SYSTEM = "You are a helpful assistant, and brief in all that you write."
EXPLICIT: Any = {"mode": "explicit"}


@pytest.fixture
def live(start_server: Callable[..., Any]) -> Any:
    """A server with room for some prompts."""
    runner = FakeRunner(vocab_size=300, num_pages=256, max_model_len=512)
    return start_server(runner=runner, dev_endpoints=True)


@pytest.fixture(scope="module")
def shared_live(start_shared: Callable[..., Any]) -> Any:
    """One for tests of errors and types, and for tests with a salt of their own."""
    return start_shared(runner=FakeRunner(vocab_size=300, num_pages=256, max_model_len=512))


def part(text: str, mark: Any = None) -> dict[str, Any]:
    own = {} if mark is None else {"prompt_cache_breakpoint": mark}
    return {"type": "text", "text": text, **own}


def chat(live: Any, *parts: Any, **more: Any) -> dict[str, Any]:
    asked = {"max_tokens": 3, "messages": [{"role": "user", "content": [*parts]}], **more}
    answer = live.post("/v1/chat/completions", ignore_eos=True, **asked)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def num_pinned(live: Any, lifetime: str) -> float:
    found: float = live.metric(f'octavo_kv_pinned_pages{{lifetime="{lifetime}"}}')
    return found


def prompt_length(live: Any, text: str) -> int:
    asked = {"messages": [{"role": "user", "content": text}]}
    length: int = live.post("/tokenize", **asked).json()["count"]
    return length


# ---- OpenAI's chats ------------------------------------------------------------------------------


def test_a_part_of_a_chat_is_pinned(live: Any) -> None:
    usage = chat(live, part(SYSTEM, EXPLICIT), part("Hello!"))["usage"]
    details = usage["prompt_tokens_details"]
    # The first breakpoint, and the implicit one at the end of the last message.
    whole = "<|im_start|>user\n" + SYSTEM + "\nHello!"
    assert details == {"cached_tokens": 0, "cache_write_tokens": len(whole)}
    assert num_pinned(live, "30m") == -(-len(whole) // PAGE)
    [started] = live.log_lines()[:1]
    assert "cache_key" not in started


@pytest.mark.parametrize(
    ("options", "lifetime"),
    [
        ({"mode": "implicit"}, "30m"),
        ({"ttl": "12h"}, "12h"),
        ({"mode": "explicit", "ttl": "12h"}, "12h"),
    ],
)
def test_the_lifetime_of_a_part_is_that_of_the_options(
    live: Any, options: dict[str, str], lifetime: str
) -> None:
    chat(live, part(SYSTEM, EXPLICIT), part("Hello!"), prompt_cache_options=options)
    assert num_pinned(live, lifetime) > len(SYSTEM) // PAGE


def test_a_part_may_have_its_own_lifetime(live: Any) -> None:
    mark = {"mode": "explicit", "ttl": "12h"}
    chat(live, part(SYSTEM, mark), part("!"), prompt_cache_options={"mode": "explicit"})
    assert num_pinned(live, "12h") > len(SYSTEM) // PAGE
    assert num_pinned(live, "30m") == 0


def test_explicit_without_a_breakpoint_leaves_no_page(live: Any) -> None:
    usage = chat(live, part(SYSTEM), max_tokens=40, prompt_cache_options=EXPLICIT)["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 0}
    assert live.metric('octavo_kv_cache_pages{state="free"}') == 256
    again = chat(live, part(SYSTEM), prompt_cache_options=EXPLICIT)["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] == 0


def test_explicit_with_a_breakpoint_leaves_the_pages_before_it(live: Any) -> None:
    chat(live, part(SYSTEM, EXPLICIT), part("x" * 40), prompt_cache_options=EXPLICIT)
    num_pages = len("<|im_start|>user\n" + SYSTEM) // PAGE
    assert live.metric('octavo_kv_cache_pages{state="cached"}') == num_pages


def test_the_latest_breakpoints_are_written(shared_live: Any) -> None:
    parts = [part(letter * 8, EXPLICIT) for letter in "abcdef"]
    body = chat(shared_live, *parts)
    [warning] = body["octavo"]["warnings"]
    assert warning["param"] == "messages.0.content.2"
    assert "latest 3" in warning["message"]
    assert chat(shared_live, *parts[:3])["octavo"]["warnings"] == []


def test_retention_pins_and_its_end_is_warned_of(live: Any) -> None:
    body = chat(live, part(SYSTEM), prompt_cache_retention="24h")
    assert num_pinned(live, "24h") > len(SYSTEM) // PAGE
    [warning] = body["octavo"]["warnings"]
    assert warning["param"] == "prompt_cache_retention"
    body = chat(live, part(SYSTEM), prompt_cache_retention="in_memory", prompt_cache_key="k")
    assert body["octavo"]["warnings"] == []
    assert live.log_lines()[-1]["cache_key"] == "k"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (
            {"prompt_cache_retention": "24h", "prompt_cache_options": {"ttl": "30m"}},
            "prompt_cache_retention",
        ),
        ({"prompt_cache_retention": "1h"}, "prompt_cache_retention"),
        ({"prompt_cache_options": {"mode": "off"}}, "prompt_cache_options.mode"),
        ({"prompt_cache_options": {"ttl": "5m"}}, "prompt_cache_options.ttl"),
        ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm"),
        ({"prompt_cache_key": 7}, "prompt_cache_key"),
    ],
)
def test_wrong_options_are_refused(shared_live: Any, asked: dict[str, Any], param: str) -> None:
    answer = shared_live.chat("x", **asked)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_wrong_breakpoint_is_refused(shared_live: Any) -> None:
    content = [part("x", {"mode": "implicit"})]
    answer = shared_live.post(
        "/v1/chat/completions", messages=[{"role": "user", "content": content}]
    )
    assert answer.json()["error"]["param"] == "messages.0.content.0.prompt_cache_breakpoint.mode"


@pytest.mark.parametrize("num_choices", [1, 2])
def test_the_details_are_a_part_of_the_prompt_in_streams_too(live: Any, num_choices: int) -> None:
    for is_warm in (False, True):
        answer = live.chat(
            SYSTEM,
            max_tokens=3,
            n=num_choices,
            stream=True,
            stream_options={"include_usage": True},
            prompt_cache_options={"mode": "implicit"},
        )
        usage = CompletionUsage.model_validate(chunks_of(answer.content)[-1]["usage"], strict=True)
        assert usage.prompt_tokens == prompt_length(live, SYSTEM)
        details = usage.prompt_tokens_details
        assert details is not None
        cached, written = details.cached_tokens or 0, details.cache_write_tokens or 0
        assert cached + written <= usage.prompt_tokens
        assert (cached > len(SYSTEM)) == is_warm
        assert (written > len(SYSTEM)) == (not is_warm)


def test_a_prompt_that_is_cut_keeps_the_breakpoints_of_its_rest(live: Any) -> None:
    chat(live, part(SYSTEM, EXPLICIT), part("y" * 20), truncate_prompt_tokens=30)
    # The first breakpoint was cut off; the other is the last message's end.
    suffix = "<|im_end|>\n<|im_start|>assistant\n"
    assert len(suffix) > 30 or num_pinned(live, "30m") > 0


def test_pins_that_do_not_hold_are_warned_of(start_server: Callable[..., Any]) -> None:
    runner = FakeRunner(vocab_size=300, num_pages=64, max_model_len=256)
    live = start_server(runner=runner, scheduler={"cache_pin_share": 0.5})
    options = {"prompt_cache_options": {"mode": "implicit"}}
    assert chat(live, part("a" * 60), **options)["octavo"]["warnings"] == []
    [displaced] = chat(live, part("b" * 60), **options)["octavo"]["warnings"]
    assert displaced["param"] == "prompt_cache_options"
    assert "older pins" in displaced["message"]
    [refused] = chat(live, part("c" * 150), **options)["octavo"]["warnings"]
    assert "not pinned" in refused["message"]
    assert live.metric('octavo_cache_pins_ended_total{cause="quota"}') == 1


# ---- OpenAI's responses --------------------------------------------------------------------------


def respond(live: Any, *texts: Any, **more: Any) -> dict[str, Any]:
    content = [
        {"type": "input_text", "text": text, **({"prompt_cache_breakpoint": mark} if mark else {})}
        for text, mark in texts
    ]
    asked = {"input": [{"role": "user", "content": content}], "max_output_tokens": 3, **more}
    answer: httpx.Response = live.post("/v1/responses", ignore_eos=True, **asked)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    Response.model_validate({key: value for key, value in body.items() if key != "octavo"})
    return body


def test_a_response_counts_the_written_tokens_by_lifetime(live: Any) -> None:
    mark = {"mode": "explicit", "ttl": "12h"}
    body = respond(
        live,
        (SYSTEM, mark),
        ("Hello!", EXPLICIT),
        ("?", None),
        prompt_cache_options=EXPLICIT,
    )
    first = len("<|im_start|>user\n" + SYSTEM)
    assert body["usage"]["input_tokens_details"] == {
        "cached_tokens": 0,
        "cache_write_tokens": first + len("\nHello!"),
        "cache_write_tokens_details": {
            "ttl_30m_tokens": len("\nHello!"),
            "ttl_12h_tokens": first,
        },
    }
    assert body["prompt_cache_options"] == {"mode": "explicit", "ttl": "30m"}
    assert (body["prompt_cache_key"], body["prompt_cache_retention"]) == (None, None)


def test_a_response_to_items_of_tools_has_breakpoints(shared_live: Any) -> None:
    output = [{"type": "input_text", "text": "2", "prompt_cache_breakpoint": EXPLICIT}]
    items = [
        {"role": "user", "content": "1+1?"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": output},
    ]
    answer = shared_live.post(
        "/v1/responses", input=items, max_output_tokens=3, prompt_cache_options=EXPLICIT
    )
    assert answer.json()["usage"]["input_tokens_details"]["cache_write_tokens"] > 0


def test_a_prewarmed_response_is_complete_and_empty(live: Any) -> None:
    body = respond(live, (SYSTEM, None), prompt_cache_options={"prewarm": True})
    assert (body["status"], body["output"], body["incomplete_details"]) == ("completed", [], None)
    assert body["usage"]["output_tokens"] == 0
    again = respond(live, (SYSTEM, None), prompt_cache_key="k")
    details = again["usage"]["input_tokens_details"]
    assert details["cached_tokens"] > len(SYSTEM)
    assert again["prompt_cache_key"] == "k"
    assert (
        details["cached_tokens"] + details["cache_write_tokens"] == again["usage"]["input_tokens"]
    )


def test_openais_client_reads_the_usage_of_a_stream(live: Any) -> None:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client:
        stream = client.responses.create(
            model="fake",
            input=SYSTEM,
            max_output_tokens=3,
            stream=True,
            prompt_cache_retention="24h",
        )
        responses = [event.response for event in stream if hasattr(event, "response")]
    usage = responses[-1].usage
    assert usage is not None
    assert usage.input_tokens_details.cache_write_tokens > len(SYSTEM)
    assert usage.input_tokens_details.cache_write_tokens_details is None, "it has other lifetimes"
    assert responses[-1].prompt_cache_retention == "24h"


@pytest.mark.parametrize(
    "item",
    [
        {"role": "assistant", "content": [{"type": "input_text", "text": "x"}]},
        {"role": "user", "content": [{"type": "output_text", "text": "x"}]},
    ],
)
def test_only_texts_for_the_model_have_breakpoints(shared_live: Any, item: Any) -> None:
    item["content"][0]["prompt_cache_breakpoint"] = EXPLICIT
    answer = shared_live.post("/v1/responses", input=[item])
    assert answer.status_code == 400
    assert "has no prompt_cache_breakpoint" in answer.json()["error"]["message"]


# ---- the engine's side, and an operator's --------------------------------------------------------


def test_the_engine_gets_the_pins_in_order(
    scripted_client: Callable[..., Any], start_server: Callable[..., Any]
) -> None:
    async def script(_client: Any, _request: Any) -> Any:
        yield TokenOutput(finish_reason=FinishReason.LENGTH)

    live = start_server(scripted_client(script))
    chat(live, part("a", EXPLICIT), part("b"), prompt_cache_retention="24h")
    [request] = live.client.requests
    head = len("<|im_start|>user\na")
    assert request.pins == (PrefixPin(head, "30m"), PrefixPin(head + 2, "24h"))
    assert request.store_up_to is None
    chat(live, part("a"))
    assert live.client.requests[-1].pins == ()


def test_an_operator_pins_and_unpins_and_resets(live: Any) -> None:
    chat(live, part(SYSTEM))
    prefix = {"messages": [{"role": "user", "content": SYSTEM}]}
    body = live.post("/admin/cache/pin", **prefix).json()
    assert body["pinned_pages"] > len(SYSTEM) // PAGE
    live.chat("x", max_tokens=1)
    assert num_pinned(live, "24h") == body["pinned_pages"]
    assert live.post("/admin/cache/pin", **prefix, cache_salt="s").json() == {"pinned_pages": 0}
    assert live.post("/admin/cache/unpin", **prefix).json() == {"ended_pins": 1}
    warned = live.post("/admin/cache/pin", prompt=SYSTEM, ttl="1h", other=1).json()
    assert warned["octavo"]["warnings"][0]["param"] == "other"
    assert live.http.post("/admin/cache/reset").json()["freed_pages"] > 0
    answer = live.post("/admin/cache/pin", **prefix, ttl="2h")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "ttl")


def test_the_cache_is_not_changed_elsewhere_nor_without_an_engine(
    start_server: Callable[..., Any], absent: Any
) -> None:
    assert absent.http.post("/admin/cache/reset").status_code == 404
    live = start_server(type(absent.client)(), dev_endpoints=True)
    for path in ("pin", "unpin", "reset"):
        assert live.post(f"/admin/cache/{path}", prompt="x").status_code == 503


def test_the_document_knows_the_usage(shared_live: Any) -> None:
    document = json.dumps(shared_live.http.get("/openapi.json").json())
    assert "ephemeral_1h_input_tokens" in document
    assert "prompt_cache_breakpoint" in document
