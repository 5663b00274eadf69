"""A daemon whose log has no reader continues to serve, and stops on a signal."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from waiting import TIMEOUT_S, wait_until

pytestmark = pytest.mark.e2e

#: More bytes of log lines than pipe and queue hold together.
_NUM_REQUESTS = 3000


class Unread:
    """A daemon of which everything is read up to `ready`, and then nothing."""

    def __init__(self, flags: tuple[str, ...]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve", "--port", "0", *flags],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.stderr = self.process.stderr
        found = None
        for line in self.stderr:
            if found := re.search(r"http://127.0.0.1:(\d+)", line):
                break
        assert found is not None, "it did not start"
        self.connection = http.client.HTTPConnection(
            "127.0.0.1", int(found.group(1)), timeout=TIMEOUT_S
        )

    def get(self, path: str) -> str:
        self.connection.request("GET", path)
        return self.connection.getresponse().read().decode()

    def generate(self) -> int:
        body = json.dumps({"prompt": "x", "max_tokens": 2})
        self.connection.request("POST", "/v1/completions", body)
        answer = self.connection.getresponse()
        answer.read()
        return answer.status

    def num_dropped(self) -> int:
        found = re.search(r"\noctavo_log_lines_dropped_total\S* (\d+)", self.get("/metrics"))
        assert found is not None
        return int(found.group(1))


@pytest.fixture
def start(tiny_flags: tuple[str, ...]) -> Iterator[Callable[[str], Unread]]:
    started: list[Unread] = []

    def start(log_format: str) -> Unread:
        started.append(Unread((*tiny_flags, "--log-format", log_format)))
        return started[-1]

    yield start
    for daemon in started:
        daemon.process.kill()
        daemon.process.wait(TIMEOUT_S)
        daemon.connection.close()
        daemon.stderr.close()


@pytest.mark.parametrize("log_format", [pytest.param("text", marks=pytest.mark.slow), "json"])
def test_it_serves_and_says_what_it_dropped_once_somebody_reads(
    start: Callable[[str], Unread], log_format: str
) -> None:
    daemon = start(log_format)
    for number in range(_NUM_REQUESTS):
        daemon.get(f"/none/{number:0200}")
    assert daemon.generate() == 200
    num_dropped = daemon.num_dropped()
    assert num_dropped > 500
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(daemon.stderr))
    reader.start()
    wait_until(lambda: any("log lines were dropped" in line for line in lines))
    daemon.get("/none/last")
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(TIMEOUT_S) == 0
    reader.join(TIMEOUT_S)
    told = [line for line in lines if "log lines were dropped" in line]
    counts = [int(found.group(1)) for line in told if (found := re.search(r"(\d+) log", line))]
    assert sum(counts) >= num_dropped
    num_read = sum("/none/" in line or "/v1/completions" in line for line in lines)
    assert num_read + sum(counts) == _NUM_REQUESTS + 2, "a line is neither told nor counted"
    assert lines.index(told[0]) < next(i for i, line in enumerate(lines) if "/none/last" in line)
    assert "stopped" in lines[-1]
    if log_format == "json":
        assert all(json.loads(line) for line in lines)


def test_it_stops_though_nobody_reads(start: Callable[[str], Unread]) -> None:
    daemon = start("text")
    for number in range(_NUM_REQUESTS):
        daemon.get(f"/none/{number:0200}")
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(TIMEOUT_S) == 0
