"""What an operator sees of an engine that hangs, dies or does not start, on the real daemon.

The model has random weights and is tiny: none of this is about what it says.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

pytestmark = pytest.mark.e2e

PATIENCE_S = 60.0
#: Of an answer that takes a millisecond, on a machine that is busy with a model's start.
LONGEST_ANSWER_S = 2.0
_MODEL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(_MODEL))
    return [f"dummy:{path}", "--kv-cache-memory", "64MiB"]


def _engine(daemon: Any) -> psutil.Process:
    children = psutil.Process(daemon.process.pid).children()
    [engine] = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    return engine


def _status(daemon: Any, path: str) -> int:
    """Ask a probe, which is to answer at once whatever the engine does."""
    began_s = time.monotonic()
    status = httpx.get(f"{daemon.url}{path}", timeout=PATIENCE_S).status_code
    assert time.monotonic() - began_s < LONGEST_ANSWER_S, f"{path} was silent"
    return status


def _until(daemon: Any, path: str, status: int, within_s: float) -> None:
    end_s = time.monotonic() + within_s
    while _status(daemon, path) != status:
        assert _status(daemon, "/health") == 200
        assert time.monotonic() < end_s, "".join(daemon.log)
        time.sleep(0.02)


def _complete(daemon: Any, prompt: list[int], max_tokens: int) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    return httpx.post(f"{daemon.url}/v1/completions", json=body, timeout=PATIENCE_S)


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
            thread.join(PATIENCE_S)
        return self.answers


def test_a_stopped_engine_is_seen_by_probes_and_replaced(
    start_daemon: Callable[..., Any], model: list[str]
) -> None:
    timeout_s = 4.0
    with start_daemon(*model, "--engine-timeout-s", str(timeout_s)) as daemon:
        undisturbed = _complete(daemon, [1, 2, 3], 4).json()["choices"][0]["text"]
        _engine(daemon).suspend()
        # Idle: nobody has asked anything.
        _until(daemon, "/ready", 503, timeout_s + LONGEST_ANSWER_S)
        _until(daemon, "/ready", 200, PATIENCE_S)
        # With far more on its way than a pipe holds.
        _engine(daemon).suspend()
        crowd = _Crowd(daemon, [[i, *([7] * 3999)] for i in range(60)], 2)
        _until(daemon, "/ready", 503, timeout_s + LONGEST_ANSWER_S)
        _until(daemon, "/ready", 200, PATIENCE_S)
        assert {answer.status_code for answer in crowd.join()} == {200}
        assert _complete(daemon, [1, 2, 3], 4).json()["choices"][0]["text"] == undisturbed
        assert daemon.stop() == 0


def test_sigterm_does_not_wait_for_a_stopped_engine(
    start_daemon: Callable[..., Any], model: list[str]
) -> None:
    with start_daemon(*model, "--drain-timeout-s", "1") as daemon:
        engine = _engine(daemon)
        engine.suspend()
        crowd = _Crowd(daemon, [[i, *([7] * 3999)] for i in range(60)], 2)
        end_s = time.monotonic() + 2
        while time.monotonic() < end_s:
            assert _status(daemon, "/health") == 200
            time.sleep(0.05)
        began_s = time.monotonic()
        assert daemon.stop() == 0
        # One second to drain, five for the engine, and what a busy machine needs.
        assert time.monotonic() - began_s < 12
        assert {answer.status_code for answer in crowd.join()} == {503}
        assert not engine.is_running()


def test_two_kills_in_a_row_under_32_streams_lose_nothing(
    start_daemon: Callable[..., Any], model: list[str]
) -> None:
    prompts = [[i, i + 1, i + 2] for i in range(1, 33)]
    with start_daemon(*model, "--max-num-seqs", "32", "--quantization", "none") as daemon:
        undisturbed = [answer.json() for answer in _Crowd(daemon, prompts, 300).join()]
        crowd = _Crowd(daemon, prompts, 300)
        for _ in range(2):
            end_s = time.monotonic() + PATIENCE_S
            while not daemon.metric("octavo_num_requests_running"):
                assert time.monotonic() < end_s
            os.kill(_engine(daemon).pid, signal.SIGKILL)
            _until(daemon, "/ready", 503, PATIENCE_S)
            _until(daemon, "/ready", 200, PATIENCE_S)
        texts = [answer.json()["choices"][0]["text"] for answer in crowd.join()]
        assert texts == [answer["choices"][0]["text"] for answer in undisturbed]


def test_a_start_that_takes_too_long_ends_the_daemon_and_says_so(model: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server", "serve", *model, "--engine-start-timeout-s", "0.1"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 1
    assert "octavo: the engine was not ready 0.1 s after its start" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_table_of_files_is_waited_out(
    start_daemon: Callable[..., Any], model: list[str]
) -> None:
    with start_daemon(*model) as daemon, httpx.Client(base_url=daemon.url, timeout=30) as probe:
        body = {"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0}
        answer = probe.post("/v1/completions", json=body)
        before = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
        # What is open stays open, and nothing more can be opened.
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (3, before[1]))
        os.kill(_engine(daemon).pid, signal.SIGKILL)
        end_s = time.monotonic() + PATIENCE_S
        # After three tries, and pauses of 1 and 2 seconds.
        while not any("started in 4 s" in line for line in daemon.log):
            assert time.monotonic() < end_s, "".join(daemon.log)
            assert probe.get("/health").status_code == 200
            time.sleep(0.02)
        refused = probe.post("/v1/completions", json=body)
        assert refused.status_code == 503
        assert 4 <= int(refused.headers["Retry-After"]) < 30
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, before)
        time.sleep(int(refused.headers["Retry-After"]))
        _until(daemon, "/ready", 200, PATIENCE_S)
        again = probe.post("/v1/completions", json=body)
        assert again.json()["choices"][0]["text"] == answer.json()["choices"][0]["text"]
        assert daemon.stop() == 0
