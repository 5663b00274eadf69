from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from server import logs
from server.logs import LOGGER_NAME, JsonFormatter, TextFormatter, fields


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
