"""Files of keys, limits a key, and keys that change while the server runs."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest

from configs.schema import ServerSection
from scheduler.client import FinishReason, GenerateRequest, Started, TokenOutput
from server.http.keys import Keyring, digest_of, load_keys, reload_keys

FILE = """
# tenants
[[key]]
name = "alice"
key = "sk-alice"
max_concurrent_requests = 2

[[key]]
key = "sk-unnamed"
"""


def written(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "keys.toml", FILE)


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


async def endless(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
    """Yield one token, then nothing for ever; a prompt of one byte is answered at once."""
    yield TokenOutput((72,), started=Started(1, 0.0, 0))
    if len(request.prompt_token_ids) == 1:
        yield TokenOutput(finish_reason=FinishReason.STOP)
    await asyncio.Event().wait()


def held(live: Any, secret: str) -> socket.socket:
    """Return a connection with a request that runs until it is closed."""
    data = json.dumps({"prompt": "hold", "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {secret}\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", live.port))
    connection.sendall(head.encode() + data)
    assert connection.recv(1) == b"H"
    return connection


def asks(live: Any, secret: str) -> Any:
    return live.http.post("/v1/completions", json={"prompt": "x"}, headers=bearer(secret))


def test_lines_are_keys(tmp_path: Path) -> None:
    path = written(tmp_path / "keys", "# tenants\nalpha\n\n  beta \n")
    keys = load_keys(ServerSection(api_key=("gamma",), api_key_file=path))
    ring = Keyring(keys)
    assert all(ring.find(key) for key in (b"alpha", b"beta", b"gamma"))
    assert ring.find(b"") is ring.find(b"# tenants") is ring.find(b"alpha ") is None
    assert len(keys) == 3


def test_toml_gives_names_and_limits(file: Path) -> None:
    keys = load_keys(ServerSection(api_key_file=file, api_key=("c",), max_requests_per_key=7))
    assert [(key.name, key.max_requests) for key in keys] == [("", 7), ("alice", 2), ("", 7)]
    assert keys[1].digest == digest_of(b"sk-alice")


@pytest.mark.parametrize("content", [None, "", "# only a comment\n", "\xff"])
@pytest.mark.parametrize("name", ["keys", "keys.toml"])
def test_a_file_without_keys_does_not_open_the_server(
    tmp_path: Path, name: str, content: str | None
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="api_key_file"):
        load_keys(ServerSection(api_key_file=path))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("sk-secret\n", "not TOML"),
        ("[[key]]\nname = 'a'\n", r"key\.0\.key"),
        ("[[key]]\nkey = 'sk-secret'\nlimit = 3\n", r"key\.0\.limit"),
        ("[[key]]\nkey = 'sk-secret'\nmax_concurrent_requests = 0\n", "max_concurrent_requests"),
        ("[[key]]\nkey = 'sk-secret'\nname = \"a\\nb\"\n", r"key\.0\.name"),
        ("[key]\nkey = 'sk-secret'\n", "key"),
        ("[[keys]]\nkey = 'sk-secret'\n", "keys"),
        ("[[key]]\nkey = 'sk-secret'\n[[key]]\nkey = 'sk-secret'\nname = 'b'\n", "twice"),
        ("[[key]]\nkey = 'sk-secret-ö'\n", "ASCII"),
        ('[[key]]\nkey = "sk-secret\\n"\n', "ASCII"),
    ],
)
def test_a_wrong_file_is_told_without_the_keys_in_it(
    tmp_path: Path, content: str, told: str
) -> None:
    section = ServerSection(api_key_file=written(tmp_path / "keys.toml", content))
    with pytest.raises(ValueError, match=told) as caught:
        load_keys(section)
    error: BaseException | None = caught.value
    while error is not None:
        assert "sk-secret" not in str(error)
        error = error.__context__


def test_an_empty_key_is_refused() -> None:
    with pytest.raises(ValueError, match="api_key"):
        load_keys(ServerSection(api_key=(" ",)))


def test_a_limit_without_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="max_requests_per_key needs keys"):
        ServerSection(max_requests_per_key=3)


@pytest.mark.parametrize(("mode", "is_warned"), [(0o644, True), (0o640, False), (0o600, False)])
def test_a_file_that_all_can_read_is_warned_of(
    file: Path, caplog: pytest.LogCaptureFixture, mode: int, is_warned: bool
) -> None:
    file.chmod(mode)
    with caplog.at_level(logging.WARNING):
        load_keys(ServerSection(api_key_file=file))
    assert ("other users can read the API keys" in caplog.text) is is_warned


def test_the_log_has_the_keys_name_and_no_key(start_server: Callable[..., Any], file: Path) -> None:
    live = start_server(api_key_file=file)
    assert asks(live, "sk-alice").status_code == 200
    assert asks(live, "sk-unnamed").status_code == 200
    assert asks(live, "sk-other").status_code == 401
    assert [line.get("key") for line in live.log_lines()] == ["alice", None, None]
    assert "sk-" not in live.log.getvalue()


def test_a_key_runs_as_many_requests_as_it_may(scripted: Callable[..., Any], file: Path) -> None:
    live = scripted(endless, api_key_file=file)
    with held(live, "sk-alice"), held(live, "sk-alice"):
        refused = asks(live, "sk-alice")
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "key_limit"
        assert int(refused.headers["retry-after"]) >= 1
        assert asks(live, "sk-unnamed").status_code == 200, "others are not held up"
        models = live.http.get("/v1/models", headers=bearer("sk-alice"))
        assert models.status_code == 200, "only what costs is counted"
    live.wait_idle()
    assert [asks(live, "sk-alice").status_code for _ in range(5)] == [200] * 5
    assert live.metric('octavo_requests_rejected_total{reason="key_limit"}') == 1
    refusals = [line for line in live.log_lines() if line["status"] == 429]
    assert [(line["key"], line["error"]) for line in refusals] == [("alice", "key_limit")]


@pytest.mark.parametrize(
    "body", [b"{", b'{"prompt": "", "n": 99}', b'{"prompt": "x", "model": "other"}', b""]
)
def test_every_end_of_a_request_is_counted(
    start_server: Callable[..., Any], file: Path, body: bytes
) -> None:
    live = start_server(api_key_file=file)
    for _ in range(4):
        answer = live.http.post("/v1/completions", content=body, headers=bearer("sk-alice"))
        assert answer.status_code in {400, 404}
    assert live.http.post("/nothing", headers=bearer("sk-alice")).status_code == 404
    assert asks(live, "sk-alice").status_code == 200


def test_keys_without_a_limit_of_their_own_have_the_common_one(
    scripted: Callable[..., Any],
) -> None:
    live = scripted(endless, api_key=("a", "b"), max_requests_per_key=1)
    with held(live, "a"):
        assert asks(live, "a").status_code == 429
        assert asks(live, "b").status_code == 200


def test_new_keys_count_and_old_ones_end_but_what_runs_goes_on(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    section = ServerSection(api_key_file=file)
    ring = Keyring(load_keys(section))
    alice = ring.find(b"sk-alice")
    assert alice is not None
    with ring.request(alice), caplog.at_level(logging.INFO):
        file.write_text(FILE.replace("= 2", "= 1").replace("sk-unnamed", "sk-new"))
        reload_keys(ring, section)
        assert ring.find(b"sk-unnamed") is None
        assert ring.find(b"sk-new") is not None
        limited = ring.find(b"sk-alice")
        assert limited is not None
        with pytest.raises(Exception, match="its limit"), ring.request(limited):
            pytest.fail("one runs already")
        ring.check()
    assert ring._num_requests == {}
    assert "API keys reloaded" in caplog.text


@pytest.mark.parametrize("content", ["", "nonsense", "[[key]]\nkey = 3\n"])
def test_a_bad_file_changes_nothing_but_the_log(
    file: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    section = ServerSection(api_key_file=file)
    ring = Keyring(load_keys(section))
    file.write_text(content)
    reload_keys(ring, section)
    assert ring.find(b"sk-alice") is not None
    assert "not reloaded" in caplog.text
