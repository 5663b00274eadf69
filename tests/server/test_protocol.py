"""What comes over a connection and is no request."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from server.protocol import HttpProtocol

PATIENCE_S = 20.0
HEAD = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"


def talk(live: Any, *said: bytes) -> bytes:
    """Say something, and hear all there is until the server closes."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=PATIENCE_S) as connection:
        for part in said:
            connection.sendall(part)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize(
    "nonsense",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"GET /v1/models HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: many\r\n\r\n",
    ],
    ids=["words", "TLS", "version", "length"],
)
def test_what_is_no_http_is_told_so_in_our_shape(shared: Any, nonsense: bytes) -> None:
    head, _, body = talk(shared, nonsense).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"application/json" in head
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "invalid_http"
    assert shared.http.get("/health").status_code == 200


@pytest.mark.parametrize("said", [b"", b"G", HEAD[:-2], HEAD + HEAD[:-2]])
def test_a_client_that_does_not_say_what_it_wants_is_left(
    live: Any, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(HttpProtocol, "head_patience_s", 0.05)
    heard = talk(live, said)
    assert heard.count(b"HTTP/1.1 200") == said.count(HEAD)


def test_patience_ends_with_the_head(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer may take longer than a head, and so may a body."""
    monkeypatch.setattr(HttpProtocol, "head_patience_s", 0.05)
    body = b'{"prompt": "x", "max_tokens": 1}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with (
        socket.create_connection(("127.0.0.1", live.port), timeout=PATIENCE_S) as slow,
    ):
        slow.sendall(head.encode())
        # As long as a connection that says nothing is waited for.
        assert talk(live) == b""
        slow.sendall(body)
        assert slow.recv(15) == b"HTTP/1.1 200 OK"
