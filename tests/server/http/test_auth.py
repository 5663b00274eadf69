from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import openai
import pytest

KEY = "sk-correct-horse"
GOOD = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def locked(start_shared: Callable[..., Any]) -> Any:
    return start_shared(api_key=("sk-other", KEY))


def test_every_route_but_the_probes_wants_a_key(locked: Any) -> None:
    for path in ("/health", "/ready", "/metrics"):
        assert locked.http.get(path).status_code == 200
    document = locked.http.get("/openapi.json", headers=GOOD).json()
    for path, operations in document["paths"].items():
        for method in operations:
            answer = locked.http.request(method, path.replace("{model_id}", "fake"))
            is_open = path in {"/health", "/ready", "/metrics"}
            assert answer.status_code == (200 if is_open else 401), path


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "TRACE", "FOO"])
@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "//v1/models",
        "/v1/models/",
        "/v1//models",
        "/health/",
        "//health",
        "/health/../v1/models",
        "/health/%2e%2e/v1/models",
        "/health%2f..%2fv1/models",
        "/metrics/v1/models",
        "/ready?x=/v1/models",
        "/HEALTH",
        "/health;x",
        "/version",
        "/openapi.json",
        "/docs",
        "/nothing",
        "/v1/models?key=/health",
    ],
)
def test_no_spelling_of_a_path_gets_around_the_key(locked: Any, method: str, path: str) -> None:
    # The raw target: httpx would tidy it up.
    with socket.create_connection(("127.0.0.1", locked.port)) as connection:
        connection.sendall(
            f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        )
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    status = int(received.split(b" ", 2)[1])
    body = received.partition(b"\r\n\r\n")[2]
    if path.startswith("/ready?"):
        assert status in {200, 400, 405}, "the path is /ready whatever the query"
    else:
        assert status in {400, 401}
    assert b'"fake"' not in body


@pytest.mark.parametrize(
    "value",
    [
        "",
        KEY,
        "Bearer",
        f"Basic {KEY}",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY.upper()}",
        f"Bearer {KEY},sk-other",
        "Bearer sk-öther",
    ],
)
def test_a_wrong_key_is_401(locked: Any, value: str) -> None:
    answer = locked.http.get("/v1/models", headers={"Authorization": value.encode("latin-1")})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert error["code"] == "invalid_api_key"
    assert error["type"] == "authentication_error"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("x-api-key", KEY)], 200),
        ([("X-API-Key", KEY)], 200),
        ([("x-api-key", KEY), ("Authorization", f"Bearer {KEY}")], 200),
        ([("x-api-key", KEY), ("Authorization", "Bearer sk-other")], 401),
        ([("x-api-key", KEY), ("Authorization", f"Basic {KEY}")], 401),
        ([("x-api-key", KEY), ("Authorization", "")], 401),
        ([("x-api-key", KEY), ("x-api-key", KEY)], 401),
        ([("x-api-key", f"Bearer {KEY}")], 401),
        ([("x-api-key", "")], 401),
    ],
)
def test_anthropics_header_does_as_well_but_does_not_contradict(
    locked: Any, headers: list[tuple[str, str]], status: int
) -> None:
    assert locked.http.get("/v1/models", headers=headers).status_code == status


def test_two_keys_in_one_request_are_none(locked: Any) -> None:
    headers = [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer wrong")]
    assert locked.http.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize("value", [f"Bearer {KEY}", f"bearer {KEY}", "Bearer sk-other"])
def test_any_accepted_key_opens(locked: Any, value: str) -> None:
    assert locked.http.get("/v1/models", headers={"Authorization": value}).status_code == 200


def test_the_openai_client_gets_in(locked: Any) -> None:
    with openai.OpenAI(base_url=locked.url + "/v1", api_key=KEY, max_retries=0) as api:
        assert [model.id for model in api.models.list()] == ["fake"]
    with (
        openai.OpenAI(base_url=locked.url + "/v1", api_key="no", max_retries=0) as api,
        pytest.raises(openai.AuthenticationError),
    ):
        api.models.list()


def test_keys_are_never_logged(locked: Any) -> None:
    locked.http.get("/v1/models", headers=GOOD)
    locked.http.get("/v1/models", headers={"Authorization": "Bearer sk-guess"})
    locked.wait_idle()
    assert KEY not in locked.log.getvalue()
    assert "sk-guess" not in locked.log.getvalue()


def test_the_probes_can_be_protected_too(start_server: Callable[..., Any]) -> None:
    live = start_server(api_key=(KEY,), protect_metrics=True)
    for path in ("/health", "/ready", "/metrics"):
        assert live.http.get(path).status_code == 401
        assert live.http.get(path, headers=GOOD).status_code == 200


def test_without_keys_all_may_ask(shared: Any) -> None:
    assert shared.http.get("/v1/models").status_code == 200
