"""An engine of the real daemon that is killed, or that cannot be started anew.

The model has random weights and is tiny: none of this is about its answers.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from engine_faults import Crowd, engine_of, wait_until_ready_is

from waiting import TIMEOUT_S, wait_until

pytestmark = pytest.mark.e2e


def test_two_kills_in_a_row_under_32_streams_lose_nothing(
    start_tiny: Callable[..., Any],
) -> None:
    prompts = [[i, i + 1, i + 2] for i in range(1, 33)]
    with start_tiny("--max-num-seqs", "32", "--quantization", "none") as daemon:
        undisturbed = [answer.json() for answer in Crowd(daemon, prompts, 300).join()]
        crowd = Crowd(daemon, prompts, 300)
        for _ in range(2):
            wait_until(lambda: daemon.metric("octavo_num_requests_running"), daemon.log)
            os.kill(engine_of(daemon).pid, signal.SIGKILL)
            wait_until_ready_is(503, daemon)
            wait_until_ready_is(200, daemon)
        texts = [answer.json()["choices"][0]["text"] for answer in crowd.join()]
        assert texts == [answer["choices"][0]["text"] for answer in undisturbed]


def test_a_full_table_of_files_is_waited_out(
    start_tiny: Callable[..., Any],
) -> None:
    with start_tiny() as daemon, httpx.Client(base_url=daemon.url, timeout=TIMEOUT_S) as probe:
        body = {"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0}
        answer = probe.post("/v1/completions", json=body)
        before = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
        # Open files stay open, and no more can be opened.
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (3, before[1]))
        os.kill(engine_of(daemon).pid, signal.SIGKILL)

        def is_third_try_over() -> bool:
            assert probe.get("/health").status_code == 200
            return any("started in 4 s" in line for line in daemon.log)

        wait_until(is_third_try_over, daemon.log)
        refused = probe.post("/v1/completions", json=body)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, before)
        wait_until_ready_is(200, daemon)
        again = probe.post("/v1/completions", json=body)
        assert again.json()["choices"][0]["text"] == answer.json()["choices"][0]["text"]
        assert daemon.stop() == 0
