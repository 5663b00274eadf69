"""Bytes on a connection that are not a request."""

from __future__ import annotations

import json
import select
import socket
import time
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from server.generation import respond
from server.http import protocol
from server.http.protocol import (
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    MAX_PIPELINED,
    HttpProtocol,
    _address_of,
)
from waiting import TIMEOUT_S, wait_until

HEAD = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"


def talk(live: Any, *said: bytes) -> bytes:
    """Send data, and return all bytes until the server closes."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=TIMEOUT_S) as connection:
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


_ASKED = {"prompt": "x", "max_tokens": 3}


@pytest.mark.parametrize(
    ("line", "body", "status", "end"),
    [
        (b"POST /v1/completions", {**_ASKED, "stream": True}, 200, b"data: [DONE]\n\n"),
        (b"POST /v1/completions", _ASKED, 200, b"}"),
        (b"POST /v1/completions", {"prompt": 5}, 400, b"}}"),
        (b"GET /metrics", None, 200, b"\n"),
        (b"GET /nothing", None, 404, b"}}"),
        (b"HEAD /health", None, 200, b""),
    ],
)
@pytest.mark.parametrize("more", [b"", b"Connection: keep-alive\r\n"])
def test_a_client_of_http_1_0_gets_a_body_that_ends_with_the_connection(
    shared: Any, line: bytes, body: dict[str, Any] | None, status: int, end: bytes, more: bytes
) -> None:
    sent = b"" if body is None else json.dumps(body).encode()
    head = line + b" HTTP/1.0\r\n" + more + b"Content-Length: %d\r\n\r\n" % len(sent)
    answer, _, heard = talk(shared, head + sent).partition(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    headers = answer.lower()
    assert b"transfer-encoding" not in headers
    assert b"connection: close" in headers
    assert heard.endswith(end)
    if b"content-length" in headers and not line.startswith(b"HEAD"):
        assert len(heard) == int(headers.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    if body and body.get("stream"):
        assert heard.startswith(b"data: {")


@pytest.mark.parametrize("said", [b"", b"G", HEAD[:-2], HEAD + HEAD[:-2]])
def test_a_client_that_does_not_say_what_it_wants_is_left(
    live: Any, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(HttpProtocol, "head_timeout_s", 1.0)
    heard = talk(live, said)
    assert heard.count(b"HTTP/1.1 200") == said.count(HEAD)


def test_the_timeout_ends_with_the_head(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer may take longer than a head, and so may a body."""
    monkeypatch.setattr(HttpProtocol, "head_timeout_s", 1.0)
    body = b'{"prompt": "x", "max_tokens": 1}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with (
        socket.create_connection(("127.0.0.1", live.port), timeout=TIMEOUT_S) as slow,
    ):
        slow.sendall(head.encode())
        # The time limit of a silent connection.
        assert talk(live) == b""
        slow.sendall(body)
        assert slow.recv(15) == b"HTTP/1.1 200 OK"


CHUNKED = b"Host: x\r\nTransfer-Encoding: chunked\r\n\r\n"
UPGRADE = (
    b"Host: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
)
#: The bytes sent once, and the bytes sent after them for ever.
ENDLESS = {
    "trailers": (b"GET /health HTTP/1.1\r\n" + CHUNKED + b"0\r\n", b"a00001: b\r\n"),
    "a trailer": (b"GET /health HTTP/1.1\r\n" + CHUNKED + b"0\r\na: ", b"b" * 64),
    "trailers unread": (b"POST /tokenize HTTP/1.1\r\n" + CHUNKED + b"0\r\n", b"a00001: b\r\n"),
    "trailers behind a body": (
        b"GET /health HTTP/1.1\r\n" + CHUNKED + b"80000\r\n" + b"b" * 0x80000 + b"\r\n0\r\n",
        b"a00001: b\r\n",
    ),
    "method": (b"", b"G" * 64),
    "path": (b"GET /", b"x" * 64),
    "path unfinished twice": (HEAD + b"GET /", b"x" * 64),
    "headers": (b"GET /health HTTP/1.1\r\n", b"a00001: b\r\n"),
    "a header": (b"GET /health HTTP/1.1\r\na: ", b"b" * 64),
    "a header's name": (b"GET /health HTTP/1.1\r\n", b"a" * 64),
    "a chunk's extension": (b"POST /tokenize HTTP/1.1\r\n" + CHUNKED + b"1;a=", b"b" * 64),
    "a chunk's size": (b"POST /tokenize HTTP/1.1\r\n" + CHUNKED, b"0" * 64),
    "tiny chunks": (b"GET /health HTTP/1.1\r\n" + CHUNKED, b"1;a=bcdefgh\r\nb\r\n"),
    "empty lines": (b"", b"\r\n" * 32),
    "empty lines later": (HEAD, b"\r\n" * 32),
    "after the end": (b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"b" * 64),
    "after an upgrade": (b"GET /health HTTP/1.1\r\n" + UPGRADE + b"\r\n", b"b" * 64),
    "pipelined": (b"", b"GET /health HTTP/1.1\r\n\r\n" * 64),
}


@pytest.mark.parametrize(("opening", "unit"), ENDLESS.values(), ids=ENDLESS)
def test_whatever_is_no_body_has_an_end(shared: Any, opening: bytes, unit: bytes) -> None:
    unit *= 2048 // len(unit) + 1
    with socket.create_connection(("127.0.0.1", shared.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(opening)
        with suppress(ConnectionError):
            for _ in range(64 * MAX_HEAD_BYTES // 2048):
                connection.sendall(unit)
            while connection.recv(65536):
                pass
    assert shared.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "said",
    [
        b"GET /" + b"x" * 2 * MAX_HEAD_BYTES,
        b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * (MAX_HEADERS + 1) + b"\r\n",
        b"GET /health HTTP/1.1\r\na: " + b"b" * 2 * MAX_HEAD_BYTES,
        b"POST /tokenize HTTP/1.1\r\n" + CHUNKED + b"0\r\na: " + b"b" * 2 * MAX_HEAD_BYTES,
    ],
    ids=["path", "headers", "header", "trailer"],
)
def test_too_large_a_head_is_told_so(shared: Any, said: bytes) -> None:
    with socket.create_connection(("127.0.0.1", shared.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(said)
        head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert json.loads(body)["error"]["code"] == "head_too_large"


#: Requests whose answer ends the connection before their end is read, and the status.
UNREAD = {
    "a refused head": (b"GET /" + b"x" * 2 * MAX_HEAD_BYTES, 431),
    "no HTTP": (b"nonsense\r\n\r\n", 400),
    "a body that is too large": (
        b"POST /tokenize HTTP/1.1\r\nConnection: close\r\nContent-Length: 1000000\r\n\r\n",
        413,
    ),
    "a body of HTTP/1.0": (b"POST /nothing HTTP/1.0\r\nContent-Length: 1000000\r\n\r\n", 404),
    "bytes behind the last request": (HEAD[:-2] + b"Connection: close\r\n\r\n", 200),
}


@pytest.mark.parametrize(("said", "status"), UNREAD.values(), ids=UNREAD)
def test_a_client_that_still_sends_gets_its_answer(shared: Any, said: bytes, status: int) -> None:
    with socket.create_connection(("127.0.0.1", shared.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(said)
        select.select([connection], [], [], TIMEOUT_S)
        # A reset by the server would raise here.
        for _ in range(20):
            connection.sendall(b"x" * 16_384)
            time.sleep(0.002)
        connection.shutdown(socket.SHUT_WR)
        heard = b"".join(iter(lambda: connection.recv(65536), b""))
    assert heard.startswith(b"HTTP/1.1 %d " % status)
    assert heard.count(b"\r\n\r\n") == 1


@pytest.mark.parametrize("limit", ["LINGER_TIMEOUT_S", "MAX_LINGER_BYTES"])
def test_a_client_that_sends_for_ever_is_not_waited_for(
    live: Any, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(protocol, "LINGER_TIMEOUT_S", TIMEOUT_S)
    monkeypatch.setattr(protocol, limit, 0.1)

    def send_for_ever() -> None:
        with socket.create_connection(("127.0.0.1", live.port), timeout=TIMEOUT_S) as connection:
            while True:
                connection.sendall(b"nonsense\r\n\r\n")
                time.sleep(0.002)

    with pytest.raises(ConnectionError):
        send_for_ever()


ASKED = b'{"prompt": "' + b"x" * 1000 + b'"}'
HONEST = {
    "a long path": (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n", [404]),
    "many headers": (b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * (MAX_HEADERS - 1), [200]),
    "an upgrade": (b"GET /health HTTP/1.1\r\n" + UPGRADE + b"\r\n" + HEAD[:-2], [200, 200]),
    "pipelined": (HEAD * MAX_PIPELINED + HEAD[:-2], [200] * (MAX_PIPELINED + 1)),
    "chunks of six bytes, and a trailer": (
        b"POST /tokenize HTTP/1.1\r\n"
        + CHUNKED
        + b"".join(b"6\r\n%b\r\n" % ASKED[i : i + 6] for i in range(0, 1014, 6))
        + b"0\r\nauthorization: Bearer other\r\n\r\n"
        + HEAD[:-2],
        [200, 200],
    ),
}


@pytest.mark.parametrize("width", [1 << 20, 4096, 7])
@pytest.mark.parametrize(("said", "statuses"), HONEST.values(), ids=HONEST)
def test_what_is_long_and_honest_is_answered_however_it_is_cut(
    shared: Any, said: bytes, statuses: list[int], width: int
) -> None:
    said += b"Connection: close\r\n\r\n"
    heard = talk(shared, *(said[i : i + width] for i in range(0, len(said), width)))
    assert [int(part[:3]) for part in heard.split(b"HTTP/1.1 ")[1:]] == statuses


def test_an_answer_that_has_begun_is_not_spoilt_by_what_comes_behind_it(live: Any) -> None:
    body = b'{"prompt": "x", "max_tokens": 250, "ignore_eos": true, "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", live.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(head + body)
        heard = connection.recv(65536)
        connection.sendall(b"nonsense\r\n\r\n")
        with suppress(ConnectionError):
            while more := connection.recv(65536):
                heard += more
    assert heard.startswith(b"HTTP/1.1 200 OK\r\n")
    assert heard.count(b"HTTP/1.1") == 1 or b"[DONE]" in heard


#: The bytes sent once, and the bytes sent after them every few milliseconds.
SLOW = {
    "empty lines": (HEAD, b"\r\n"),
    "a body after its answer": (
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n",
        b"b",
    ),
    "trailers after the answer": (b"GET /health HTTP/1.1\r\n" + CHUNKED + b"0\r\na: ", b"b"),
    "a head": (b"", HEAD[:1]),
    "a body": (b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n\r\n", b"b"),
    "a chunk's size": (b"POST /tokenize HTTP/1.1\r\n" + CHUNKED, b"0"),
}


@pytest.mark.parametrize(("opening", "unit"), SLOW.values(), ids=SLOW)
def test_a_trickle_is_not_waited_for(
    live: Any, monkeypatch: pytest.MonkeyPatch, opening: bytes, unit: bytes
) -> None:
    monkeypatch.setattr(HttpProtocol, "head_timeout_s", 0.2)
    monkeypatch.setattr(respond, "BODY_TIMEOUT_S", 0.2)
    live.call(_timeout_between_requests(live, 0.2))
    with socket.create_connection(("127.0.0.1", live.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(opening)
        end_s = time.monotonic() + TIMEOUT_S
        try:
            while time.monotonic() < end_s:
                connection.sendall(unit)
                readable = select.select([connection], [], [], 0.02)[0]
                if readable and not connection.recv(65536):
                    return
        except ConnectionError:
            return
    pytest.fail("it is still waited for")


async def _timeout_between_requests(live: Any, timeout_s: float) -> None:
    live._server.config.timeout_keep_alive = timeout_s


def test_an_address_has_so_many_connections(start_server: Any) -> None:
    live = start_server(max_connections_per_address=3)
    live.http.close()
    with ExitStack() as stack:
        for _ in range(3):
            one = socket.create_connection(("127.0.0.1", live.port), timeout=TIMEOUT_S)
            stack.enter_context(one).sendall(HEAD)
            assert one.recv(15) == b"HTTP/1.1 200 OK"
        head, _, body = talk(live).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
        assert b"Retry-After: 1" in head
        assert json.loads(body)["error"]["code"] == "connection_limit"
    # One that is gone does not count.
    wait_until(lambda: not live.connections_by_address)


def test_of_ipv6_a_network_counts_as_one() -> None:
    first, second = _address_of(("2001:db8:1:2::1", 1)), _address_of(("2001:db8:1:2:3::4", 2))
    assert first == second != _address_of(("2001:db8:1:3::1", 1))
    assert _address_of(("10.0.0.1", 1)) != _address_of(("10.0.0.2", 1))
    assert _address_of(None) == ""
    assert _address_of(("fe80::1%eth0", 1)) == "fe80::/64"
