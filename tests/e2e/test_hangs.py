"""An engine of the real daemon that hangs, or takes too long to start.

The model has random weights and is tiny: none of this is about its answers.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from engine_faults import Crowd, complete, engine_of, status_of, wait_until_ready_is

from waiting import TIMEOUT_S

pytestmark = pytest.mark.e2e


def test_a_stopped_engine_is_seen_by_probes_and_replaced(
    start_tiny: Callable[..., Any],
) -> None:
    # For an engine that answers in milliseconds.
    with start_tiny("--engine-timeout-s", "10") as daemon:
        undisturbed = complete(daemon, [1, 2, 3], 4).json()["choices"][0]["text"]
        engine_of(daemon).suspend()
        # Idle: no request has come.
        wait_until_ready_is(503, daemon)
        wait_until_ready_is(200, daemon)
        # With far more on its way than a pipe holds.
        engine_of(daemon).suspend()
        crowd = Crowd(daemon, [[i, *([7] * 3999)] for i in range(60)], 2)
        wait_until_ready_is(503, daemon)
        wait_until_ready_is(200, daemon)
        assert {answer.status_code for answer in crowd.join()} == {200}
        assert complete(daemon, [1, 2, 3], 4).json()["choices"][0]["text"] == undisturbed
        assert daemon.stop() == 0


def test_sigterm_does_not_wait_for_a_stopped_engine(
    start_tiny: Callable[..., Any],
) -> None:
    # Waiting for the engine would exceed the timeout of the test.
    limits = ("--engine-timeout-s", str(2 * TIMEOUT_S), "--drain-timeout-s", "1")
    with start_tiny(*limits) as daemon:
        engine = engine_of(daemon)
        engine.suspend()
        crowd = Crowd(daemon, [[i, *([7] * 3999)] for i in range(60)], 2)
        for _ in range(40):
            assert status_of(daemon, "/health") == 200
        assert daemon.stop() == 0
        assert {answer.status_code for answer in crowd.join()} == {503}
        assert not engine.is_running()


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
