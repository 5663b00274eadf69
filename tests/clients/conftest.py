"""The servers that every client is tried against, and how suites that live elsewhere are run.

Clients that do not fit into the project's environment have one of their own, and a suite that is a
program: it writes its results as JUnit XML. It finds the servers in `SUITE_*` variables; for Python
this file is loaded there too, so that every suite has the same fixtures. A missing program is a
failure with the command to run, never a skip.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import httpx
import pytest
from plain_http import NO_AUTHORITIES

from waiting import TIMEOUT_S, wait_until

FOLDER = Path(__file__).parent
NODE = FOLDER / "node"
ROOT = FOLDER.parent.parent
#: Installed by `make clients`.
PROGRAMS = ROOT / ".venv-clients" / "bin"
KEY = "a-key-of-the-tests"


@dataclass(frozen=True)
class Served:
    """A server and the settings of its clients."""

    url: str
    key: str
    model: str

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    def metrics(self) -> dict[str, float]:
        """Return all series by name, with a state's name behind it: `kv_cache_pages.private`."""
        found: dict[str, float] = {}
        for line in httpx.get(
            f"{self.url}/metrics", timeout=TIMEOUT_S, verify=NO_AUTHORITIES
        ).text.splitlines():
            if line.startswith("octavo_"):
                name, _, value = line.removeprefix("octavo_").rpartition(" ")
                state = re.search(r'state="(\w+)"', name)
                key = name.partition("{")[0] + (f".{state[1]}" if state else "")
                found[key] = found.get(key, 0.0) + float(value)
        return found

    def wait_for(self, **counts: int) -> None:
        """Wait until each gauge has this value."""
        wait_until(lambda: self._gauges(counts) == counts)

    def _gauges(self, names: Iterable[str]) -> dict[str, float]:
        metrics = self.metrics()
        return {name: metrics[name] for name in names}

    def check_idle(self) -> None:
        """Wait until nothing runs or waits; then no page is in use."""
        self.wait_for(num_requests_running=0, num_requests_waiting=0)
        seen = self.metrics()
        assert seen["kv_cache_pages.private"] == seen["kv_cache_pages.leased"] == 0


@pytest.fixture(scope="session")
def served(request: pytest.FixtureRequest) -> Served:
    """The default model with default settings, open to all."""
    if url := os.environ.get("SUITE_URL"):
        return Served(url, "none", os.environ["SUITE_MODEL"])
    return Served(request.getfixturevalue("daemon").url, "none", "SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def guarded(request: pytest.FixtureRequest) -> Iterator[Served]:
    """A server with a key, a model that calls tools, and room for one request and one waiting."""
    if url := os.environ.get("SUITE_GUARDED_URL"):
        yield Served(url, os.environ["SUITE_GUARDED_KEY"], os.environ["SUITE_GUARDED_MODEL"])
        return
    flags = {
        "--api-key": KEY,
        "--max-num-seqs": "1",
        "--max-queue": "1",
        "--kv-cache-memory": "128MiB",
    }
    model = request.getfixturevalue("tool_model")
    started = request.getfixturevalue("start_daemon")(
        str(model), *(word for flag in flags.items() for word in flag)
    )
    with started as daemon:
        yield Served(daemon.url, KEY, model.stem)


@pytest.fixture(scope="session")
def tool_model(smollm2_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model with a template that offers tools, and shows how they are called."""
    path = tmp_path_factory.mktemp("model") / "SmolLM2-tools.gguf"
    program = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata"]
    template = ["--chat-template-file", str(FOLDER / "tools.jinja")]
    done = subprocess.run(
        [*program, *template, str(smollm2_file), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="session")
def suite_environ(served: Served, guarded: Served) -> dict[str, str]:
    """The addresses of the servers, for the suites elsewhere."""
    return {
        "SUITE_URL": served.url,
        "SUITE_MODEL": served.model,
        "SUITE_GUARDED_URL": guarded.url,
        "SUITE_GUARDED_MODEL": guarded.model,
        "SUITE_GUARDED_KEY": guarded.key,
        # Clients that would fetch prices from the internet, or report their use.
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LANGSMITH_TRACING": "false",
    }


@pytest.fixture
def run_suite(
    suite_environ: dict[str, str], tmp_path: Path, subtests: pytest.Subtests
) -> Callable[..., None]:
    """Run suites that live elsewhere (by their extension), each of their tests as one of ours."""

    def run(*names: str) -> None:
        report = tmp_path / "report.xml"
        is_node = names[0].endswith(".mjs")
        command = (_node_command if is_node else _python_command)(names, report)
        for test, fault in _run(command, report, suite_environ):
            with subtests.test(test):
                if fault is not None:
                    pytest.fail(fault, pytrace=False)

    return run


def _python_command(names: Iterable[str], report: Path) -> list[str]:
    # Without the project's conftest, which needs the project's environment.
    options = ["-p", "no:cacheprovider", "-W", "default", f"--confcutdir={FOLDER}"]
    suites = [str(FOLDER / name) for name in names]
    return [str(PROGRAMS / "python"), "-m", "pytest", *options, f"--junitxml={report}", *suites]


def _node_command(names: Iterable[str], report: Path) -> list[str]:
    # In one process, so that none is left when the time is over.
    options = ["--test", "--test-isolation=none", f"--test-timeout={TIMEOUT_S * 1000:.0f}"]
    output = ["--test-reporter=junit", f"--test-reporter-destination={report}"]
    return [str(PROGRAMS / "node"), *options, *output, *(str(NODE / name) for name in names)]


def _run(command: list[str], report: Path, environ: dict[str, str]) -> list[tuple[str, str | None]]:
    """Return each test's name and its fault, or the reason it did not run."""
    if not Path(command[0]).exists():
        pytest.fail(f"{command[0]} is missing; `make clients` puts it there", pytrace=False)
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT_S,
        check=False,
    )
    outcomes = list(_outcomes(report)) if report.exists() else []
    has_faults = any(fault for _, fault in outcomes)
    if not outcomes or (done.returncode != 0 and not has_faults):
        pytest.fail(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return outcomes


def _outcomes(report: Path) -> Iterator[tuple[str, str | None]]:
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - written by our own tests
        faults = [
            f"{part.tag}: {part.get('message') or ''}\n{part.text or ''}"
            for part in case
            if part.tag in ("failure", "error", "skipped")
        ]
        suite = (case.get("classname") or "").rpartition(".")[2]
        yield f"{suite}: {case.get('name')}", "\n".join(faults) or None


@pytest.fixture(autouse=True)
def _leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the servers that it used are idle, and no page is lost."""
    yield
    for name in ("served", "guarded"):
        if name in request.fixturenames:
            request.getfixturevalue(name).check_idle()


@pytest.fixture
def fill(guarded: Served) -> Callable[[], AbstractContextManager[Callable[[], None]]]:
    """Keep the guarded server busy, and its queue full, until the end or a call of the result."""

    @contextmanager
    def filling() -> Iterator[Callable[[], None]]:
        guarded.check_idle()
        with ExitStack() as busy:
            for num_waiting in (0, 1):
                busy.enter_context(_unread_request(guarded))
                guarded.wait_for(num_requests_running=1, num_requests_waiting=num_waiting)
            yield busy.close

    return filling


def _unread_request(server: Served) -> AbstractContextManager[Any]:
    host, port = server.url.removeprefix("http://").split(":")
    # Without max_tokens, so that it goes on for as long as the context has room.
    said = [{"role": "user", "content": "Once"}]
    asked = {"messages": said, "ignore_eos": True, "stream": True}
    body = json.dumps(asked).encode()
    head = {
        "Host": host,
        "Authorization": f"Bearer {server.key}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
    }
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        *(f"{name}: {value}" for name, value in head.items()),
    ]
    connection = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return connection
