"""A daemon that is stopped while it starts: at once, exit code 0, and no child is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.memory import descendants
from waiting import TIMEOUT_S, wait_until

pytestmark = pytest.mark.e2e

#: Where the start is interrupted: a line of the log, and seconds behind it; None: in the midst of
#: the imports.
MOMENTS = [
    *((None, delay_s) for delay_s in (0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 1.0)),
    *(("starting", delay_s) for delay_s in (0.0, 0.02, 0.05, 0.1, 0.3, 1.0, 1.5, 2.0)),
    *(("ready", delay_s) for delay_s in (0.0, 0.01)),
]


@contextmanager
def _starting(flags: tuple[str, ...]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "serve", "--port", "0", *flags],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(TIMEOUT_S)
        assert process.stderr is not None
        process.stderr.close()


def _is_importing(process: subprocess.Popen[str]) -> bool:
    return "pydantic_core" in Path(f"/proc/{process.pid}/maps").read_text()


def _wait(process: subprocess.Popen[str], line: str | None) -> None:
    if line is None:
        wait_until(lambda: _is_importing(process))
        return
    assert process.stderr is not None
    while line not in (said := process.stderr.readline()):
        assert said, "it ended"


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _signals_at(moments: list[tuple[str | None, float]]) -> Iterator[Any]:
    """Yield both signals for every moment; the faster half has one for each, in turns."""
    for index, (line, delay_s) in enumerate(moments):
        for number in (signal.SIGTERM, signal.SIGINT):
            is_sampled = index % 2 == (number == signal.SIGINT)
            yield pytest.param(line, delay_s, number, marks=() if is_sampled else pytest.mark.slow)


@pytest.mark.parametrize(("line", "delay_s", "number"), list(_signals_at(MOMENTS)))
def test_a_start_is_stopped_at_any_moment(
    tiny_flags: tuple[str, ...], line: str | None, delay_s: float, number: signal.Signals
) -> None:
    with _starting(tiny_flags) as process:
        _wait(process, line)
        time.sleep(delay_s)
        children = list(descendants(process.pid))
        process.send_signal(number)
        assert process.wait(TIMEOUT_S) == 0
        wait_until(lambda: not any(map(_is_alive, children)))
