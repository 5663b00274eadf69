"""Fixtures of the whole suite: the real daemon with the real model, and the model's file."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, settings
from plain_http import NO_AUTHORITIES

from model.weights.source import octavo_home, resolve
from waiting import TIMEOUT_S

# The time that a machine takes for an example is not a property of the code.
settings.register_profile(
    "any speed",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("any speed")

#: As text and as JSON.
_READY = re.compile(r'\bready(?: url=|", "url": ")([^\s"]+)')


class Daemon:
    """One `octavo serve`, as a user starts it."""

    def __init__(
        self,
        *flags: str,
        program: Sequence[str] = (sys.executable, "-m", "server"),
        environ: Mapping[str, str] = os.environ,
        folder: Path | None = None,
    ) -> None:
        self.process = subprocess.Popen(
            [*program, "serve", "--port", "0", *flags],
            stderr=subprocess.PIPE,
            text=True,
            # Each change of the code would leave another file of hundreds of megabytes.
            env={"OCTAVO_WEIGHTS_CACHE": "off", **environ, "PYTHONUNBUFFERED": "1"},
            cwd=folder,
        )
        self.log: list[str] = []
        self.url = ""
        self._has_said = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := _READY.search(line):
                self.url = found.group(1)
                self._has_said.set()
        self._has_said.set()

    def wait_ready(self) -> None:
        assert self._has_said.wait(TIMEOUT_S), "neither ready nor dead"
        assert self.url, "".join(self.log)

    def metrics(self) -> str:
        return httpx.get(f"{self.url}/metrics", timeout=TIMEOUT_S, verify=NO_AUTHORITIES).text

    def metric(self, name: str) -> float:
        """Return the sum over all label sets of one series."""
        text = self.metrics()
        found = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
        assert found, f"no series {name}"
        return sum(map(float, found))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextmanager
def _started(*flags: str, **how: Any) -> Iterator[Daemon]:
    daemon = Daemon(*flags, **how)
    try:
        daemon.wait_ready()
        yield daemon
    finally:
        daemon.close()


@pytest.fixture(scope="session")
def start_daemon() -> Callable[..., object]:
    return _started


@pytest.fixture(scope="session")
def daemon(smollm2_file: Path) -> Iterator[Daemon]:
    """The default model with default settings, for all tests that change nothing in it."""
    del smollm2_file  # It is fetched by now, so that the start takes no minute.
    with _started() as running:
        yield running


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    return resolve("smollm2", home=octavo_home(), progress=False).path


#: Folders and files that take long, and would be the last ones in the order of names.
_LONG = tuple(Path(__file__).parent / name for name in ("wheel", "server/test_openapi.py"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long ones first: one that begins last runs at the end, beside idle workers."""
    items.sort(key=lambda item: not any(item.path.is_relative_to(path) for path in _LONG))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write the reference data anew")
