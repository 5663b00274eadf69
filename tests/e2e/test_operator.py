"""Settings on the real daemon: keys, encryption, and limits on clients that do not read.

The model has random weights and is tiny: none of this is about its answers.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from event_streams import chunks_of
from waiting import TIMEOUT_S, wait_until

pytestmark = pytest.mark.e2e


def test_sighup_exchanges_the_keys_of_a_running_server(
    start_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "keys.toml"

    def allow(key: str) -> None:
        file.write_text(f"[[key]]\nname = 'alice'\nkey = '{key}'\n")
        file.chmod(0o600)

    def status(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.get(f"{daemon.url}/v1/models", headers=headers, timeout=TIMEOUT_S).status_code

    def answer(key: str, **more: Any) -> Any:
        asked = {"input": "kept for alice", "max_output_tokens": 8, **more}
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(
            f"{daemon.url}/v1/responses", json=asked, headers=headers, timeout=TIMEOUT_S
        ).json()

    allow("sk-first")
    with start_tiny("--api-key-file", str(file)) as daemon:
        assert (status("sk-first"), status("sk-second")) == (200, 401)
        first = answer("sk-first")
        allow("sk-second")
        daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: status("sk-second") == 200, daemon.log)
        assert status("sk-first") == 401
        # The new key has the old one's name, and so its stored responses.
        second = answer("sk-second", previous_response_id=first["id"])
        details = second["usage"]["input_tokens_details"]
        assert details["cached_tokens"] >= first["usage"]["input_tokens"] - 1
        file.write_text("nonsense")
        daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: any("not reloaded" in line for line in daemon.log), daemon.log)
        assert status("sk-second") == 200
        assert daemon.stop() == 0
    log = "".join(daemon.log)
    assert "key=alice" in log
    assert "sk-" not in log


def test_https_is_served_and_verified(start_tiny: Callable[..., Any], tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    trusts = ssl.create_default_context()
    authority.configure_trust(trusts)
    with start_tiny("--ssl-certfile", str(cert), "--ssl-keyfile", str(key)) as daemon:
        assert daemon.url.startswith("https://127.0.0.1:")
        body = {"prompt": "x", "max_tokens": 50, "stream": True, "ignore_eos": True}
        with httpx.Client(base_url=daemon.url, verify=trusts, timeout=TIMEOUT_S) as client:
            answer = client.post("/v1/completions", json=body)
            assert chunks_of(answer.content)
            with pytest.raises(httpx.ConnectError, match="certificate"):
                httpx.get(f"{daemon.url}/health", timeout=TIMEOUT_S)
            with pytest.raises(httpx.HTTPError):
                httpx.get(daemon.url.replace("https", "http") + "/health", timeout=TIMEOUT_S)
            assert client.get("/health").status_code == 200, "nonsense on the port hurts nobody"
        assert daemon.stop() == 0


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--ssl-keyfile", "key.pem"], "ssl_keyfile and ssl_keyfile_password need ssl_certfile"),
        (["--ssl-certfile", "none.pem"], "ssl_certfile none.pem cannot be read"),
        (["--api-key-file", "none.toml"], "api_key_file none.toml cannot be read"),
        (["--max-requests-per-key", "1"], "max_requests_per_key needs keys"),
        (["--cors-origins", "example.org"], "cors_origins: 'example.org' is no origin"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_one_line_and_exit_code_2(
    flags: list[str], told: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server", "serve", "--port", "0", *flags],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 2
    assert re.fullmatch(rf".*{re.escape(told)}.*\n", done.stderr)


#: In every event, so that few tokens are many bytes.
_LONG_NAME = "x" * 8192
#: Warns at the end of each Python process; no start is to show it.
_WARNS = "import atexit, warnings\natexit.register(warnings.warn, 'for developers')\n"


#: Of the engine and of the API process, with a part of their error.
_START_ERRORS = (
    (["--kv-cache-memory", "1KiB"], "kv_cache_memory: 1 KiB hold no page of 16 tokens"),
    (["--host", "256.256.256.256"], "cannot listen on 256.256.256.256:0"),
    (["--device", "cuda"], "device: cuda was asked for, but torch finds no GPU here"),
    (["--dtype", "float16"], "dtype on a CPU is float32, got float16"),
)


def _start_errors() -> Iterator[Any]:
    """Yield each error in both formats; the faster half has one of each, in turns."""
    for index, (flags, told) in enumerate(_START_ERRORS):
        for log_format in ("text", "json"):
            is_sampled = (index // 2 + index) % 2 == (log_format == "json")
            marks = () if is_sampled else pytest.mark.slow
            yield pytest.param(flags, told, log_format, marks=marks)


@pytest.mark.parametrize(("flags", "told", "log_format"), list(_start_errors()))
def test_a_start_error_is_one_plain_line(
    tmp_path: Path, tiny_config: Path, flags: list[str], told: str, log_format: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(_WARNS)
    command = [sys.executable, "-m", "server", "serve", f"dummy:{tiny_config}"]
    environ = {name: text for name, text in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        [*command, "--port", "0", "--log-format", log_format, *flags],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env={**environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 1
    *before, last = done.stderr.splitlines()
    if log_format == "json":
        assert json.loads(last)["reason"].startswith(told)
        assert all(json.loads(line)["level"] == "INFO" for line in before)
    else:
        assert last.startswith(f"octavo: {told}")
        assert all(" INFO " in line for line in before), done.stderr


def test_every_line_has_the_format_and_says_what_an_operator_needs(
    start_tiny: Callable[..., Any],
) -> None:
    flags = ("--log-format", "json", "--api-key", "sesame", "--served-model-name", _LONG_NAME)
    with start_tiny(*flags, "--kv-cache-dtype", "int8") as daemon:
        body = {"prompt": "x", "max_tokens": 10_000, "ignore_eos": True, "stream": True}
        headers = {"Authorization": "Bearer sesame"}
        url = f"{daemon.url}/v1/completions"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=TIMEOUT_S) as answer:
            lines = answer.iter_lines()
            assert "data: " in next(lines)
            daemon.process.send_signal(signal.SIGINT)
            wait_until(lambda: any("draining" in line for line in daemon.log))
            assert httpx.get(f"{daemon.url}/ready", timeout=TIMEOUT_S).status_code == 503
            daemon.process.send_signal(signal.SIGINT)
            assert daemon.process.wait(TIMEOUT_S) == 0
    logged = [json.loads(line) for line in daemon.log]
    by_event = {line["event"]: line for line in logged}
    starting = by_event["starting"]
    assert set(starting) - {"time", "level", "event", "version"} == {
        *("model", "port", "log_format", "api_key", "served_model_name", "kv_cache_memory"),
        *("weights_cache", "kv_cache_dtype"),
    }
    assert starting["api_key"] == ["***"]
    assert by_event["loading"]["model"] == starting["model"]
    assert by_event["draining"]["hint"] == "press Ctrl-C again to stop at once"
    assert by_event["draining"]["running"] == 1
    notes = [line["note"] for line in logged if line["event"] == "note"]
    assert any("int8: perplexity" in note and "511 built-in tokens" in note for note in notes)
    ready = by_event["ready"]
    # Two heads of 16 elements and a scale each, twice, in two layers.
    assert (ready["kv_cache_dtype"], ready["kv_bytes_per_token"]) == ("int8", 2 * 2 * 2 * 18)
    assert ready["kv_factor"] == round(32 / 18, 2)
    assert {line["level"] for line in logged} <= {"INFO", "WARNING"}
    assert "sesame" not in "".join(daemon.log)


class Unread:
    """A streamed request whose client does not read."""

    def __init__(self, url: str, max_tokens: int) -> None:
        data = json.dumps(
            {"prompt": "x", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        ).encode()
        host, port = url.removeprefix("http://").split(":")
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        self.connection = socket.socket()
        self.connection.settimeout(TIMEOUT_S)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.connection.connect((host, int(port)))
        self.connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    def rest(self) -> bytes:
        return b"".join(iter(lambda: self.connection.recv(1 << 20), b""))


def _read_beside(url: str) -> int:
    """Read a stream of 400 tokens to its end, and return their number from the usage."""
    body = {
        "prompt": "y",
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S)
    num_tokens: int = chunks_of(answer.content)[-1]["usage"]["completion_tokens"]
    return num_tokens


def _api_bytes(daemon: Any) -> int:
    """Return the resident memory of the API process."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found.group(1)) * 1024


def test_readers_that_stopped_cost_no_memory_and_slow_nobody(
    start_tiny: Callable[..., Any],
) -> None:
    max_tokens, num_unread = 1500, 8
    # On a slow machine they are unread for longer than the limit.
    with start_tiny("--served-model-name", _LONG_NAME, "--send-timeout-s", "0") as daemon:
        assert _read_beside(daemon.url) == 400
        before = _api_bytes(daemon)
        unread = [Unread(daemon.url, max_tokens) for _ in range(num_unread)]
        assert _read_beside(daemon.url) == 400
        all_tokens = 2 * 400 + num_unread * max_tokens
        # Answers without a reader are computed to the end.
        wait_until(lambda: daemon.metric("octavo_iteration_tokens_sum") >= all_tokens)
        grown_bytes = _api_bytes(daemon) - before
        as_events = num_unread * max_tokens * len(_LONG_NAME)
        assert grown_bytes < as_events / 5, f"{grown_bytes} of {as_events} bytes are held"
        rest = unread[0].rest()
        assert b"data: [DONE]" in rest
        assert len(rest) < max_tokens * len(_LONG_NAME), "what was not read became one event"
        for one in unread:
            one.connection.close()
        assert daemon.stop() == 0


def test_a_reader_that_stays_away_is_dropped_and_its_pages_are_free(
    start_tiny: Callable[..., Any],
) -> None:
    with start_tiny("--served-model-name", _LONG_NAME, "--send-timeout-s", "5") as daemon:
        unread = Unread(daemon.url, 16_000)
        assert _read_beside(daemon.url) == 400
        wait_until(lambda: any("status=499" in line for line in daemon.log), daemon.log)
        line = next(line for line in daemon.log if "status=499" in line)
        assert "finish_reason=abort" in line
        private = 'kv_cache_pages{model_name="' + _LONG_NAME + '",state="private"} 0.0'
        wait_until(lambda: private in daemon.metrics())
        assert daemon.metric("octavo_num_requests_running") == 0
        unread.connection.close()
        assert _read_beside(daemon.url) == 400
        assert daemon.stop() == 0
