"""Bytes to events to an answer, for servers with all habits."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loadtest.answer import Answer
from loadtest.sse import EventReader

_ODD = (
    ": welcome\r\n\r\nevent: message\r\nid: 7\r\ndata: one\r\n\r\n"
    "data:two\n\n\n"
    "data: three,\ndata: in two lines\n\n"
    ": a comment\ndata: dürfen 𝄞\n\n"
    "retry: 10\n\ndata\n\ndata: cr\r\rdata: never ended"
).encode()
_EXPECTED = [b"one", b"two", b"three,\nin two lines", "dürfen 𝄞".encode(), b"", b"cr"]


def test_events_are_the_same_wherever_the_stream_is_cut() -> None:
    for cut in range(len(_ODD) + 1):
        reader = EventReader()
        assert reader.feed(_ODD[:cut]) + reader.feed(_ODD[cut:]) == _EXPECTED, cut
    reader = EventReader()
    single = [event for i in range(len(_ODD)) for event in reader.feed(_ODD[i : i + 1])]
    assert single == _EXPECTED


def _answer(*events: tuple[float, Any], ends: bool = True) -> Answer:
    answer = Answer()
    for now_s, event in events:
        answer.take(event if isinstance(event, bytes) else json.dumps(event).encode(), now_s)
    if ends:
        answer.end()
    return answer


def _chat(**delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}], "usage": None}


def _text(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text}], **more}


def _usage(prompt: int, out: int, cached: int | None = None) -> dict[str, Any]:
    details = None if cached is None else {"cached_tokens": cached}
    usage = {"prompt_tokens": prompt, "completion_tokens": out, "prompt_tokens_details": details}
    return {"choices": [], "usage": usage}


def test_an_opening_without_content_is_not_the_first_token() -> None:
    answer = _answer(
        (1.0, _chat(role="assistant", content="")),
        (1.5, b""),
        (2.0, _chat(content="a")),
        (3.0, _chat(content="b")),
        (3.5, {"choices": [{"delta": {}, "finish_reason": "stop"}]}),
        (4.0, _usage(9, 2, cached=8)),
        (4.0, b"[DONE]"),
    )
    assert answer.arrivals() == ((2.0, 3.0), (1.0, 1.0))
    assert (answer.text, answer.finish_reason, answer.failure) == ("ab", "stop", None)
    assert (answer.prompt_tokens, answer.output_tokens, answer.cached_tokens) == (9, 2, 8)


def test_reasoning_and_calls_are_text_too() -> None:
    call = {"index": 0, "function": {"name": "f", "arguments": ""}}
    arguments = {"index": 0, "function": {"arguments": "{}"}}
    answer = _answer(
        (1.0, _chat(reasoning_content="hm")),
        (2.0, _chat(tool_calls=[call])),
        (3.0, _chat(tool_calls=[arguments])),
        (3.0, b"[DONE]"),
    )
    assert answer.text == "hmf{}"
    assert answer.arrivals()[0] == (1.0, 2.0, 3.0)


def test_pieces_read_together_came_at_one_moment() -> None:
    answer = _answer((1.0, _text("a")), (2.0, _text("b")), (2.0, _text("c")), (2.0, b"[DONE]"))
    assert answer.arrivals() == ((1.0, 2.0), (1.0, 2.0))


def test_without_counts_of_pieces_the_usage_is_shared_evenly() -> None:
    answer = _answer((1.0, _text("a")), (2.0, _text("bc")), (2.5, _usage(4, 3)), (3.0, b"[DONE]"))
    assert answer.arrivals() == ((1.0, 2.0), (1.5, 1.5))


def test_counts_of_pieces_are_taken_as_told() -> None:
    answer = _answer(
        (1.0, _text("a") | {"usage": _usage(4, 1)["usage"]}),
        (2.0, _text("bc") | {"usage": _usage(4, 3)["usage"]}),
        (2.5, _usage(4, 3)),
        (3.0, b"[DONE]"),
    )
    assert answer.arrivals() == ((1.0, 2.0), (1.0, 2.0))


@pytest.mark.parametrize(
    ("events", "kind", "message"),
    [
        ([(1.0, _text("a")), (2.0, {"error": {"message": "broke"}})], "stream error", "broke"),
        ([(1.0, {"error": "plain"})], "stream error", "plain"),
        ([(1.0, b"{half")], "malformed", "no JSON"),
        ([(1.0, b"[1]")], "malformed", "no object"),
        ([(1.0, {"choices": ["x"]})], "malformed", "no object"),
        ([(1.0, _text("a"))], "truncated", "after 1 pieces"),
        ([], "truncated", "after 0 pieces"),
    ],
)  # fmt: skip
def test_what_went_wrong_has_a_kind(events: list[Any], kind: str, message: str) -> None:
    failure = _answer(*events).failure
    assert failure is not None
    assert failure.kind == kind
    assert message in failure.message


def test_a_finish_reason_is_an_end_without_done() -> None:
    answer = _answer((1.0, {"choices": [{"text": "a", "finish_reason": "length"}]}))
    assert answer.failure is None


def test_whether_it_is_json() -> None:
    assert _answer((1.0, _text('{"a": ')), (2.0, _text("1}"))).is_json()
    assert not _answer((1.0, _text("{"))).is_json()


def _calls(*parts: dict[str, Any]) -> Answer:
    answer = Answer()
    for part in parts:
        answer.take(json.dumps({"choices": [{"delta": {"tool_calls": [part]}}]}).encode(), 1.0)
    return answer


def test_an_answer_is_a_message_of_the_next_request() -> None:
    assert _answer((1.0, _chat(content="so ")), (2.0, _chat(content="it is"))).message() == {
        "role": "assistant",
        "content": "so it is",
    }
    answer = _calls(
        {"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"x"'}},
        {"index": 0, "function": {"arguments": ": 1}"}},
        {"index": 1, "function": {"name": "g", "arguments": '{"cut'}},
    )
    assert answer.message()["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        # A server would refuse arguments that are not JSON.
        {"id": "call_1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
