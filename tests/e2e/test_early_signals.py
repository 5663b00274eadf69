"""A daemon that is told to stop while it starts: at once, exit code 0, and no child is left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.memory import descendants

pytestmark = pytest.mark.e2e

PATIENCE_S = 60.0
#: Where the start is interrupted: a line of the log, and seconds behind it; None: in the midst of
#: the imports.
MOMENTS = [
    *((None, delay_s) for delay_s in (0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 1.0)),
    *(("starting", delay_s) for delay_s in (0.0, 0.02, 0.05, 0.1, 0.3, 1.0, 1.5, 2.0)),
    *(("ready", delay_s) for delay_s in (0.0, 0.01)),
]


@contextmanager
def _starting(model: Path) -> Iterator[subprocess.Popen[str]]:
    flags = ("--port", "0", "--kv-cache-memory", "16MiB")
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "serve", f"dummy:{model}", *flags],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        assert process.stderr is not None
        process.stderr.close()


def _is_importing(process: subprocess.Popen[str]) -> bool:
    return "pydantic_core" in Path(f"/proc/{process.pid}/maps").read_text()


def _wait(process: subprocess.Popen[str], line: str | None) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while line is None and not _is_importing(process):
        assert time.monotonic() < end_s, "it does not start"
    assert process.stderr is not None
    while line is not None and line not in process.stderr.readline():
        assert time.monotonic() < end_s


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("line", "delay_s"), MOMENTS)
def test_a_start_is_stopped_at_any_moment(
    tmp_path: Path, line: str | None, delay_s: float, number: signal.Signals
) -> None:
    model = tmp_path / "tiny.json"
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    counts = {"num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 512}
    model.write_text(
        json.dumps({"model_type": "llama", "max_position_embeddings": 1024, **shape, **counts})
    )
    with _starting(model) as process:
        _wait(process, line)
        time.sleep(delay_s)
        children = list(descendants(process.pid))
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 0
        end_s = time.monotonic() + PATIENCE_S
        while any(map(_is_alive, children)):
            assert time.monotonic() < end_s, "a child is left"
