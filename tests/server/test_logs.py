from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from configs.schema import SchedulerSection
from model.fake import FakeRunner
from scheduler.process import ProcessClient
from server import logs
from server.logs import LOGGER_NAME, JsonFormatter, TextFormatter, fields, reported


def test_a_request_is_one_line(live: Any) -> None:
    body = live.chat("a private question", max_tokens=3).json()
    [line] = live.log_lines()
    assert line.pop("time").endswith("Z")
    assert all(line.pop(name) >= 0 for name in ("queue_ms", "ttft_ms", "total_ms"))
    assert line == {
        "level": "INFO",
        "event": "request",
        "id": body["id"].removeprefix("chatcmpl-"),
        "method": "POST",
        "route": "/v1/chat/completions",
        "model": "fake",
        "status": 200,
        "prompt_tokens": body["usage"]["prompt_tokens"],
        "cached_tokens": 0,
        "output_tokens": 3,
        "finish_reason": "length",
        "client": "127.0.0.1",
    }


def test_contents_are_never_logged(live: Any) -> None:
    answer = live.chat("a private question", max_tokens=3, stream=True)
    live.post("/v1/chat/completions", messages=[{"role": "a private role", "content": "x"}])
    live.wait_idle()
    assert answer.status_code == 200
    assert "private" not in live.log.getvalue()


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        (
            "/v1/completions",
            {"prompt": "x", "temperature": 9},
            {
                "status": 400,
                "error": "invalid_request_error",
                "param": "temperature",
                "reason": "temperature must be between 0 and 2",
            },
        ),
        (
            "/v1/completions",
            {"prompt": "x", "model": "gpt-9"},
            {"status": 404, "error": "model_not_found", "param": "model", "reason": "not served"},
        ),
        (
            "/v1/completions",
            {"prompt": "x" * 9000},
            {"status": 413, "error": "request_too_large", "reason": "larger than the 4096 bytes"},
        ),
        (
            "/v1/messages",
            {"messages": []},
            {"status": 400, "param": "messages", "reason": "messages"},
        ),
        ("/nothing", {}, {"status": 404, "error": "not_found", "reason": "there is no route"}),
        ("/v1/models", {}, {"status": 405, "error": "method_not_allowed", "reason": "POST"}),
    ],
)
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_refusal_is_told_with_its_reason(
    start_server: Callable[..., Any],
    path: str,
    body: dict[str, Any],
    told: dict[str, Any],
    log_format: Any,
) -> None:
    live = start_server(max_request_bytes=4096)
    logs.configure(log_format, live.log)
    live.post(path, **body)
    live.wait_idle()
    [line] = live.log.getvalue().splitlines()
    line = json.loads(line) if log_format == "json" else _pairs(line)
    for name, value in told.items():
        assert str(value) in str(line[name]), line


def _pairs(line: str) -> dict[str, str]:
    return {
        name: json.loads(value) if value.startswith('"') else value
        for name, value in re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)', line)
    }


_PRIVATE = "sesame"
_SPELLINGS = (_PRIVATE, f"a'{_PRIVATE}", f'"{_PRIVATE}', f"''{_PRIVATE}\\'", f"it's '{_PRIVATE}\n")
_MESSAGE: dict[str, Any] = {"role": "user", "content": "x"}
_FUNCTION: dict[str, Any] = {"name": "f", "parameters": {}}


def _wrong_bodies(text: str) -> dict[str, list[dict[str, Any]]]:
    """Return requests that are refused, by route; each has `text` where one may be quoted."""
    schema = {"type": "object", "properties": {text: {"type": text}}}
    forms: list[dict[str, Any]] = [
        {"response_format": {"type": text}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": schema},
            }
        },
        {"structured_outputs": {"regex": f"({text}"}},
        {"structured_outputs": {"grammar": f"start: {text}"}},
        {"structured_outputs": {"grammar": f"root ::= {text}"}},
        {"structured_outputs": {"json": text}},
    ]
    shared: list[dict[str, Any]] = [
        *forms,
        {"model": text},
        {"temperature": text},
        {"stop": {text: text}},
        {"stop": [text] * 99},
        {"logit_bias": {text: 1}},
        {"seed": text},
    ]
    chats: list[dict[str, Any]] = [
        {"messages": [{"role": text, "content": text}]},
        {"messages": [{"role": "user", "content": [{"type": text, "text": text}]}]},
        {"messages": [_MESSAGE], "tools": [{"type": text, "function": {"name": text}}]},
        {"messages": [_MESSAGE], "tools": [{"type": "function", "function": {"name": text}}]},
        {
            "messages": [_MESSAGE],
            "tools": [{"type": "function", "function": _FUNCTION}],
            "tool_choice": {"type": "function", "function": {"name": text}},
        },
    ]
    return {
        "/v1/completions": [{"prompt": text, **more} for more in shared],
        "/v1/chat/completions": [*chats, *({"messages": [_MESSAGE], **more} for more in shared)],
        "/v1/responses": [
            {"input": [{"type": text}]},
            {"input": [{"role": text, "content": text}]},
            {"input": text, "previous_response_id": text},
            {"input": text, "include": [text]},
            {"input": text, "tools": [{"type": text}]},
            {"input": text, "text": {"format": {"type": text}}},
        ],
        "/v1/messages": [
            {"messages": [{"role": "user", "content": [{"type": text}]}], "max_tokens": 1},
            {"messages": [{"role": text, "content": text}], "max_tokens": 1},
            {"messages": [_MESSAGE], "max_tokens": 1, "tools": [{"type": text, "name": text}]},
        ],
        "/tokenize": [{"prompt": text, "messages": [_MESSAGE]}, {"messages": [{"role": text}]}],
        "/detokenize": [{"tokens": text}, {"tokens": [1], "model": text}],
    }


def test_no_text_of_a_request_is_logged_with_its_error(speaking: Callable[..., Any]) -> None:
    template = (
        "{%- for m in messages %}{%- if m.role not in ['user', 'assistant'] %}"
        "{{ raise_exception('no role ' ~ m.role ~ ' here') }}{%- endif %}"
        "{{ m.content }}{%- endfor %}"
    )
    live = speaking("x", template=template)
    num_refused = 0
    for text in _SPELLINGS:
        for path, bodies in _wrong_bodies(text).items():
            for body in bodies:
                answer = live.post(path, **body)
                num_refused += 400 <= answer.status_code < 500
    live.wait_idle()
    log = live.log.getvalue()
    assert num_refused > 40 * len(_SPELLINGS)
    assert log.count('"reason"') == num_refused
    assert [line for line in log.splitlines() if _PRIVATE in line] == []


def test_503_while_draining_is_no_error(live: Any) -> None:
    live.lifecycle.begin_drain()
    assert live.http.get("/ready").status_code == 503
    assert live.chat().status_code == 503
    [line] = live.log_lines()
    assert (line["level"], line["status"], line["error"]) == ("INFO", 503, "unavailable")
    assert line["reason"].startswith("the server is shutting down")


def test_what_takes_long_is_told_again(live: Any) -> None:
    async def work() -> None:
        async with reported("loading", model="m", interval_s=0.0):
            while live.log.getvalue().count("\n") < 3:  # noqa: ASYNC110 - a log has no event
                await asyncio.sleep(0)

    live.call(work())
    first, second, *_ = live.log_lines()
    assert (first["event"], first["model"], "elapsed_s" in first) == ("loading", "m", False)
    assert (second["event"], second["model"]) == ("loading", "m")
    assert second["elapsed_s"] >= 0


class _TalkativeRunner(FakeRunner):
    def __init__(self) -> None:
        super().__init__()
        logging.getLogger("model").warning("said by the engine")


def test_the_engines_lines_have_the_format_too(capfd: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        prepare = partial(logs.configure, "json")
        client = ProcessClient(_TalkativeRunner, SchedulerSection(), prepare=prepare)
        await client.start()
        await client.close()

    asyncio.run(work())
    [line] = capfd.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "said by the engine"


def test_probes_leave_no_lines(live: Any) -> None:
    for path in ("/health", "/ready", "/metrics"):
        live.http.get(path)
    live.http.get("/version")
    assert [line["route"] for line in live.log_lines()] == ["/version"]


@pytest.mark.parametrize("given", ["abc-123", "x" * 128, "!#$%~"])
def test_a_given_id_is_kept(shared: Any, given: str) -> None:
    answer = shared.http.post(
        "/v1/completions",
        json={"prompt": "x", "max_tokens": 1},
        headers={"X-Request-Id": given},
    )
    assert answer.headers["x-request-id"] == given
    assert answer.json()["id"] == f"cmpl-{given}"


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "ä", "a\tb"])
def test_a_bad_id_is_replaced(shared: Any, given: str) -> None:
    answer = shared.http.get("/nothing", headers={"X-Request-Id": given.encode("latin-1")})
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def test_ids_are_on_every_answer_and_differ(shared: Any) -> None:
    paths = ["/health", "/nothing", "/v1/models", "/metrics", "/v1/completions"]
    ids = [shared.http.get(path).headers["x-request-id"] for path in paths]
    assert len(set(ids)) == len(ids)


@pytest.fixture
def root_kept() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("root_kept")
@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize(
    "forged", ['x" status=200\nINFO request id=forged', "x\nINFO", "\x1b[2J", "x\u2028y"]
)
def test_a_value_cannot_forge_a_line(log_format: Any, forged: str) -> None:
    stream = io.StringIO()
    logs.configure(log_format, stream)
    logging.getLogger(LOGGER_NAME).info("request", extra=fields(route=forged, none=None))
    [line] = stream.getvalue().splitlines()
    assert "\x1b" not in line
    if log_format == "json":
        assert json.loads(line)["route"] == forged
    else:
        route = line.partition("route=")[2]
        assert json.loads(route) == forged


@pytest.mark.parametrize("make", [TextFormatter, JsonFormatter])
def test_a_traceback_is_kept(make: Callable[[], logging.Formatter]) -> None:
    error = KeyError("what went wrong")
    record = logging.LogRecord("x", 40, "", 0, "failed", (), (KeyError, error, None))
    line = make().format(record)
    assert "failed" in line
    assert "KeyError: 'what went wrong'" in line


def test_text_lines_are_pairs() -> None:
    record = logging.LogRecord("x", 20, "", 0, "request", (), None)
    vars(record).update(fields(id="abc", status=200, empty=""))
    line = TextFormatter().format(record)
    assert re.fullmatch(r'\S+Z INFO request id=abc status=200 empty=""', line)
