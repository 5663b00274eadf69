"""Peers with other habits: each fault is reported by name, and never counted as a latency."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from loadtest.answer import Answer
from loadtest.drive import Bounds, Driver
from loadtest.presets import PRESETS
from loadtest.probe import learn
from loadtest.prompts import Composer, Manner, Spelling
from loadtest.target import Outcome, Target, TargetError
from loadtest.wire import WireError
from loadtest.workloads import Shape
from waiting import TIMEOUT_S

_STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
_END = b"0\r\n\r\n"
_DONE = b"data: [DONE]\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _text(text: str) -> bytes:
    body = json.dumps({"choices": [{"text": text}]}, ensure_ascii=False)
    return f"data: {body}\r\n\r\n".encode()


def _usage(prompt: int, out: int) -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": out}
    return b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"


def _plain(status: bytes, body: bytes, *headers: bytes) -> bytes:
    lines = [b"HTTP/1.1 " + status, b"Content-Length: %d" % len(body), *headers, b"", body]
    return b"\r\n".join(lines)


def _run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


async def _stream(url: str, timeout_s: float = TIMEOUT_S) -> tuple[Answer, Outcome]:
    target, answer = Target("odd", url), Answer()
    try:
        outcome = await target.stream("/v1/completions", {"prompt": "x"}, timeout_s, answer)
        target.pool.check()
        return answer, outcome
    finally:
        target.close()


def test_characters_events_and_chunks_may_be_cut_anywhere(odd_server: Callable[..., Any]) -> None:
    events = b": hello\r\n\r\n" + _text("dürfen") + _text("𝄞") + _usage(3, 2) + _DONE
    raw = _STREAM + b"".join(_chunk(events[i : i + 7]) for i in range(0, len(events), 7)) + _END

    async def work() -> None:
        async with odd_server([raw[i : i + 11] for i in range(0, len(raw), 11)]) as odd:
            answer, outcome = await _stream(odd.url)
        assert outcome.failure is None
        assert answer.text == "dürfen𝄞"
        assert (answer.prompt_tokens, answer.output_tokens) == (3, 2)
        moments, tokens = answer.arrivals()
        assert len(moments) == 2
        assert moments[0] < moments[1]
        assert tokens == (1.0, 1.0)

    _run(work())


def test_a_body_without_length_ends_with_the_connection(odd_server: Callable[..., Any]) -> None:
    head = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"

    async def work() -> None:
        async with odd_server([head, _text("a"), _DONE]) as odd:
            answer, outcome = await _stream(odd.url)
        assert (answer.text, outcome.failure) == ("a", None)

    _run(work())


_BUSY = _plain(b"429 Too Many", b'{"error": {"message": "come later"}}', b"Retry-After: 7")
_DATED = _plain(b"503 Away", b"closed", b"Retry-After: Sun, 22 Nov 2026 00:00:00 GMT")
_WHOLE = _plain(b"200 OK", b'{"choices": []}', b"Content-Type: application/json")
_ERROR = b'data: {"error": {"message": "out of memory"}}\n\n'


@pytest.mark.parametrize(
    ("steps", "kind", "message", "retry_after_s"),
    [
        ([_BUSY], "http 429", "come later", 7.0),
        ([_DATED], "http 503", "closed", 1.0),
        ([_plain(b"400 No", b'{"detail": "bad"}')], "http 400", "bad", None),
        ([_plain(b"307 Moved", b"", b"Location: /")], "http 307", "", None),
        ([_WHOLE], "no stream", "choices", None),
        ([_STREAM, _chunk(_text("a") + _ERROR), _END], "stream error", "out of memory", None),
        ([_STREAM, _chunk(_text("a")), _END], "truncated", "after 1 pieces", None),
        ([_STREAM, _chunk(_text("a")), "close"], "reset", "before the end", None),
        ([_STREAM, _chunk(_text("a")), "reset"], "reset", "", None),
        (["reset"], "reset", "", None),
        ([b"SSH-2.0-OpenSSH\r\n\r\n"], "malformed", "no HTTP", None),
        ([_STREAM, b"zz\r\n"], "malformed", "no HTTP", None),
        ([_STREAM, _chunk(b"data: {oops\n\n"), _END], "malformed", "no JSON", None),
    ],
    ids=lambda value: value if isinstance(value, str) and value else "",
)
def test_a_failure_has_a_kind(
    odd_server: Callable[..., Any],
    steps: list[bytes | str],
    kind: str,
    message: str,
    retry_after_s: float | None,
) -> None:
    async def work() -> None:
        async with odd_server(steps) as odd:
            _, outcome = await _stream(odd.url)
        assert outcome.failure is not None
        assert outcome.failure.kind == kind
        assert message in outcome.failure.message
        assert outcome.retry_after_s == retry_after_s

    _run(work())


def test_silence_is_a_timeout(odd_server: Callable[..., Any]) -> None:
    async def work() -> None:
        async with odd_server([_STREAM, _chunk(_text("a")), "hang"]) as odd:
            answer, outcome = await _stream(odd.url, timeout_s=1.0)
        assert outcome.failure is not None
        assert outcome.failure.kind == "timeout"
        assert answer.text == "a"

    _run(work())


def test_nobody_there() -> None:
    async def work() -> None:
        _, outcome = await _stream("http://127.0.0.1:1")
        assert outcome.failure is not None
        assert outcome.failure.kind == "connect"

    _run(work())


def test_connections_are_reused_and_an_idle_one_may_be_gone(odd_server: Callable[..., Any]) -> None:
    answer = _plain(b"200 OK", b"{}")

    async def work() -> None:
        # The first closes, unannounced, at the third request.
        async with odd_server([answer, "again", answer, "again", "close"], [answer]) as odd:
            target = Target("odd", odd.url)
            for _ in range(3):
                assert await target.get("/") == (200, {})
            assert target.pool.stats().opened_total == 2
            assert len(odd.requests) == 4
            target.pool.check()
            target.close()
            assert target.pool.stats().num_idle == 0

    _run(work())


def test_a_fault_in_reading_is_not_taken_for_the_servers(odd_server: Callable[..., Any]) -> None:
    def broken(_: object) -> Any:
        raise ZeroDivisionError

    async def work() -> None:
        async with odd_server([_plain(b"200 OK", b"{}")]) as odd:
            target = Target("odd", odd.url)
            with pytest.raises(ZeroDivisionError):
                await target.pool.request("GET", "/", broken)

    _run(work())


def test_what_is_sent(odd_server: Callable[..., Any]) -> None:
    async def work() -> None:
        async with odd_server([_plain(b"200 OK", b"{}")]) as odd:
            target = Target("odd", odd.url + "/base/v1/", api_key="secret")
            await target.post("/tokenize", {"prompt": "x"})
            target.close()
        head, _, body = odd.requests[0].partition(b"\r\n\r\n")
        assert head.startswith(b"POST /base/tokenize HTTP/1.1\r\nHost: 127.0.0.1:")
        assert b"\r\nAuthorization: Bearer secret" in head
        assert body == b'{"prompt":"x"}'

    _run(work())


# ---- learning how to ask -------------------------------------------------------------------------

_NO = _plain(b"400 No", b'{"error": {"message": "unknown field"}}')
_NOT_FOUND = _plain(b"404 No", b"{}")


def _said(prompt: int) -> bytes:
    return _STREAM + _chunk(_text("a") + _usage(prompt, 1) + _DONE) + _END


def _again(*answers: bytes) -> list[bytes | str]:
    """Return the script of one connection with these answers in turn."""
    return [step for answer in answers for step in (answer, "again")][:-1]


async def _learn(url: str, endpoint: Any = None) -> Any:
    target = Target("odd", url)
    workload = PRESETS["c8"][1](Shape(endpoint=endpoint))
    try:
        return await learn(
            target, "m", workload, form="auto", wants_continuous_usage=False, extra={}
        )
    finally:
        target.close()


def test_token_ids_come_from_either_shape_of_tokenize(odd_server: Callable[..., Any]) -> None:
    empty, ids = (
        _plain(b"200 OK", b'{"tokens": []}'),
        _plain(b"200 OK", b'{"tokens": [1, 5, 6, 5]}'),
    )

    async def work() -> None:
        async with odd_server(_again(empty, ids, _said(32))) as odd:
            learnt = await _learn(odd.url)
            assert learnt.composer.spelling.token_ids == (5, 6)
            assert learnt.composer.manner == Manner(ending="ignore_eos")
            assert learnt.notes == ()
            assert b'"content":"and ' in odd.requests[1]

    _run(work())


def test_what_is_refused_is_left_out_and_words_are_counted(odd_server: Callable[..., Any]) -> None:
    async def work() -> None:
        # No /tokenize; neither ignore_eos nor min_tokens; 1.5 tokens a word and 10 around them.
        answers = (_NOT_FOUND, _NOT_FOUND, _NO, _NO, _said(58), _said(106))
        async with odd_server(_again(*answers)) as odd:
            learnt = await _learn(odd.url)
            assert learnt.composer.manner.ending == "none"
            assert learnt.composer.spelling == Spelling(None, 1.5, 10.0)
            assert any("may end early" in note for note in learnt.notes)
            assert b"ignore_eos" in odd.requests[2]
            assert b"min_tokens" in odd.requests[3]

    _run(work())


def test_a_server_without_usage(odd_server: Callable[..., Any]) -> None:
    silent = _STREAM + _chunk(_text("a") + _DONE) + _END

    async def work() -> None:
        async with odd_server(_again(_NO, _NO, _NO, silent, silent)) as odd:
            learnt = await _learn(odd.url, endpoint="chat")
            assert learnt.composer.manner == Manner(ending="none", has_usage=False)
            assert any("a word is taken for one token" in note for note in learnt.notes)

    _run(work())


@pytest.mark.parametrize(
    ("answers", "message"),
    [([_NO] * 4, "http 400: unknown field"), ([_BUSY], "http 429: come later")],
)
def test_a_server_that_takes_nothing(
    odd_server: Callable[..., Any], answers: list[bytes], message: str
) -> None:
    async def work() -> None:
        async with odd_server(_again(*answers)) as odd:
            with pytest.raises(TargetError, match=message):
                await _learn(odd.url, endpoint="chat")

    _run(work())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (_plain(b"401 No", b'{"error": {"message": "who are you"}}'), "API key: who are you"),
        (_plain(b"200 OK", b'{"data": []}'), "names no model"),
        (_plain(b"500 Oh", b"<html>"), "status 500"),
    ],
)
def test_models(odd_server: Callable[..., Any], answer: bytes, message: str) -> None:
    async def work() -> None:
        async with odd_server([answer]) as odd:
            target = Target("odd", odd.url)
            with pytest.raises(TargetError, match=message):
                await target.models()

    _run(work())


def test_failures_in_a_run_are_records_without_latency(odd_server: Callable[..., Any]) -> None:
    workload = PRESETS["c1"][1](Shape(num_conversations=3))
    composer = Composer("m", workload, Spelling(), Manner())
    later = _plain(b"429 Busy", b"{}", b"Retry-After: 0")

    async def work() -> None:
        async with odd_server(_again(_said(129), later, _said(129))) as odd:
            target = Target("odd", odd.url)
            driver = Driver(target, composer, Bounds(3))
            await driver.run_closed()
            target.close()
        kinds = [one.failure.kind if one.failure else None for one in driver.records]
        assert kinds == [None, "http 429", None]
        assert [one.ttft_s is None for one in driver.records] == [False, True, False]
        assert driver.live.num_failed == 1
        assert driver.live.num_tokens == 2
        assert not driver.live.running

    _run(work())


def test_a_busy_connection_ends_with_its_pool(odd_server: Callable[..., Any]) -> None:
    async def work() -> None:
        async with odd_server(["hang"]) as odd:
            target = Target("odd", odd.url)
            asking = asyncio.create_task(target.pool.request("GET", "/", lambda _: lambda *_: None))
            while not odd.requests:  # noqa: ASYNC110 - the stub has no event for it
                await asyncio.sleep(0)
            assert target.pool.stats().num_busy == 1
            target.close()
            with pytest.raises(WireError):
                await asking

    _run(work())
