"""An engine of the real daemon that hangs, crashes or does not start.

The model has random weights and is tiny: none of this is about its answers.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

from waiting import TIMEOUT_S, wait_until

pytestmark = pytest.mark.e2e


def _engine(daemon: Any) -> psutil.Process:
    children = psutil.Process(daemon.process.pid).children()
    [engine] = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    return engine


def _status(daemon: Any, path: str) -> int:
    """Call a probe, which must answer in any state of the engine."""
    return httpx.get(f"{daemon.url}{path}", timeout=TIMEOUT_S).status_code


def _wait_until_ready_is(status: int, daemon: Any) -> None:
    def is_so() -> bool:
        assert _status(daemon, "/health") == 200
        return _status(daemon, "/ready") == status

    wait_until(is_so, daemon.log)


def _complete(daemon: Any, prompt: list[int], max_tokens: int) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    return httpx.post(f"{daemon.url}/v1/completions", json=body, timeout=TIMEOUT_S)


class _Crowd:
    """Requests side by side, each in a thread of its own."""

    def __init__(self, daemon: Any, prompts: list[list[int]], max_tokens: int) -> None:
        self.answers: list[httpx.Response | Exception | None] = [None] * len(prompts)

        def ask(index: int) -> None:
            try:
                self.answers[index] = _complete(daemon, prompts[index], max_tokens)
            except httpx.HTTPError as error:
                self.answers[index] = error

        self._threads = [
            threading.Thread(target=ask, args=(index,), daemon=True)
            for index in range(len(prompts))
        ]
        for thread in self._threads:
            thread.start()

    def join(self) -> list[Any]:
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        return self.answers


def test_a_stopped_engine_is_seen_by_probes_and_replaced(
    start_tiny: Callable[..., Any],
) -> None:
    # For an engine that answers in milliseconds.
    with start_tiny("--engine-timeout-s", "10") as daemon:
        undisturbed = _complete(daemon, [1, 2, 3], 4).json()["choices"][0]["text"]
        _engine(daemon).suspend()
        # Idle: no request has come.
        _wait_until_ready_is(503, daemon)
        _wait_until_ready_is(200, daemon)
        # With far more on its way than a pipe holds.
        _engine(daemon).suspend()
        crowd = _Crowd(daemon, [[i, *([7] * 3999)] for i in range(60)], 2)
        _wait_until_ready_is(503, daemon)
        _wait_until_ready_is(200, daemon)
        assert {answer.status_code for answer in crowd.join()} == {200}
        assert _complete(daemon, [1, 2, 3], 4).json()["choices"][0]["text"] == undisturbed
        assert daemon.stop() == 0


def test_sigterm_does_not_wait_for_a_stopped_engine(
    start_tiny: Callable[..., Any],
) -> None:
    # Waiting for the engine would exceed the timeout of the test.
    limits = ("--engine-timeout-s", str(2 * TIMEOUT_S), "--drain-timeout-s", "1")
    with start_tiny(*limits) as daemon:
        engine = _engine(daemon)
        engine.suspend()
        crowd = _Crowd(daemon, [[i, *([7] * 3999)] for i in range(60)], 2)
        for _ in range(40):
            assert _status(daemon, "/health") == 200
        assert daemon.stop() == 0
        assert {answer.status_code for answer in crowd.join()} == {503}
        assert not engine.is_running()


def test_two_kills_in_a_row_under_32_streams_lose_nothing(
    start_tiny: Callable[..., Any],
) -> None:
    prompts = [[i, i + 1, i + 2] for i in range(1, 33)]
    with start_tiny("--max-num-seqs", "32", "--quantization", "none") as daemon:
        undisturbed = [answer.json() for answer in _Crowd(daemon, prompts, 300).join()]
        crowd = _Crowd(daemon, prompts, 300)
        for _ in range(2):
            wait_until(lambda: daemon.metric("octavo_num_requests_running"), daemon.log)
            os.kill(_engine(daemon).pid, signal.SIGKILL)
            _wait_until_ready_is(503, daemon)
            _wait_until_ready_is(200, daemon)
        texts = [answer.json()["choices"][0]["text"] for answer in crowd.join()]
        assert texts == [answer["choices"][0]["text"] for answer in undisturbed]


def test_a_start_that_takes_too_long_ends_the_daemon_and_says_so(
    tiny_flags: tuple[str, ...],
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server", "serve", *tiny_flags, "--engine-start-timeout-s", "0.1"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1
    assert "octavo: the engine was not ready 0.1 s after its start" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_table_of_files_is_waited_out(
    start_tiny: Callable[..., Any],
) -> None:
    with start_tiny() as daemon, httpx.Client(base_url=daemon.url, timeout=TIMEOUT_S) as probe:
        body = {"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0}
        answer = probe.post("/v1/completions", json=body)
        before = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
        # Open files stay open, and no more can be opened.
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (3, before[1]))
        os.kill(_engine(daemon).pid, signal.SIGKILL)

        def is_third_try_over() -> bool:
            assert probe.get("/health").status_code == 200
            return any("started in 4 s" in line for line in daemon.log)

        wait_until(is_third_try_over, daemon.log)
        refused = probe.post("/v1/completions", json=body)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, before)
        _wait_until_ready_is(200, daemon)
        again = probe.post("/v1/completions", json=body)
        assert again.json()["choices"][0]["text"] == answer.json()["choices"][0]["text"]
        assert daemon.stop() == 0
