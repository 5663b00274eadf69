"""Pages of other origins: only named ones may send requests, and these can read errors too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from configs.schema import ServerSection

PAGE = "https://chat.example.org"
KEY = "sk-x"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}
ALLOWED = "access-control-allow-origin"


@pytest.fixture(scope="module")
def open_to_page(start_shared: Callable[..., Any]) -> Any:
    return start_shared(api_key=(KEY,), cors_origins=(PAGE,))


def test_a_preflight_needs_no_key(open_to_page: Any) -> None:
    answer = open_to_page.http.options("/v1/chat/completions", headers=PREFLIGHT)
    assert answer.status_code == 200
    assert answer.headers[ALLOWED] == PAGE
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "x-stainless-lang" in answer.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in answer.headers


def test_a_page_may_use_every_method_that_a_route_has(open_to_page: Any) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    paths = open_to_page.http.get("/openapi.json", headers=headers).json()["paths"]
    methods = {method.upper() for path in paths.values() for method in path}
    assert methods >= {"GET", "POST", "DELETE"}
    for method in methods:
        asked = PREFLIGHT | {"Access-Control-Request-Method": method}
        assert open_to_page.http.options("/v1/models", headers=asked).status_code == 200, method


@pytest.mark.parametrize(
    "changed",
    [
        {"Origin": "https://evil.example.org"},
        {"Origin": PAGE + ".evil.org"},
        {"Origin": PAGE + ":8443"},
        {"Access-Control-Request-Method": "PATCH"},
    ],
)
def test_a_preflight_of_others_is_refused_in_our_shape(
    open_to_page: Any, changed: dict[str, str]
) -> None:
    answer = open_to_page.http.options("/v1/completions", headers=PREFLIGHT | changed)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "cors"
    assert answer.headers.get(ALLOWED) in {None, PAGE}
    assert answer.headers.get(ALLOWED) != changed.get("Origin", "")


def test_answers_and_errors_can_be_read_by_the_page(open_to_page: Any) -> None:
    asked = {"Origin": PAGE, "Authorization": f"Bearer {KEY}"}
    post = open_to_page.http.post
    answers = [
        post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=asked),
        post("/v1/completions", json={"prompt": "x", "stream": True}, headers=asked),
        post("/v1/completions", json={"prompt": 5}, headers=asked),
        post("/v1/completions", json={"prompt": "x"}, headers={"Origin": PAGE}),
        post("/nothing", headers=asked),
        open_to_page.http.delete("/v1/models", headers=asked),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 400, 401, 404, 405]
    for answer in answers:
        assert answer.headers[ALLOWED] == PAGE
        assert answer.headers["vary"] == "Origin"
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]


def test_other_origins_get_no_leave_to_read(open_to_page: Any) -> None:
    asked = {"Origin": "https://evil.example.org", "Authorization": f"Bearer {KEY}"}
    answer = open_to_page.http.get("/v1/models", headers=asked)
    assert answer.status_code == 200
    assert ALLOWED not in answer.headers


def test_the_key_is_still_needed(open_to_page: Any) -> None:
    options = open_to_page.http.options("/v1/models", headers={"Origin": PAGE})
    assert options.status_code == 401, "without the method it asks for it is no preflight"
    assert open_to_page.http.get("/v1/models", headers={"Origin": PAGE}).status_code == 401


def test_a_star_is_for_all(start_server: Callable[..., Any]) -> None:
    live = start_server(cors_origins=("*",))
    assert live.http.options("/v1/models", headers=PREFLIGHT).headers[ALLOWED] == "*"
    assert live.http.get("/v1/models", headers={"Origin": "null"}).headers[ALLOWED] == "*"


def test_without_origins_there_is_no_such_header(shared: Any) -> None:
    for answer in (
        shared.http.options("/v1/chat/completions", headers=PREFLIGHT),
        shared.http.get("/v1/models", headers={"Origin": PAGE}),
        shared.http.get("/health", headers={"Origin": PAGE}),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert "vary" not in answer.headers
    assert shared.http.options("/v1/models", headers=PREFLIGHT).status_code == 405


@pytest.mark.parametrize("origin", ["*", "null", PAGE, "http://localhost:3000", "app://obsidian"])
def test_origins(origin: str) -> None:
    assert ServerSection(cors_origins=(origin,)).cors_origins == (origin,)


@pytest.mark.parametrize(
    "origin", ["", "chat.example.org", PAGE + "/", PAGE + "/chat", "https://Chat.example.org", "**"]
)
def test_what_no_browser_sends_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(ValueError, match="cors_origins"):
        ServerSection(cors_origins=(origin,))
