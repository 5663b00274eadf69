"""A real Prometheus reads the metrics, and answers the queries of the dashboard."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from waiting import TIMEOUT_S, wait_until

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
#: Where `make clients` unpacks Debian's package.
_UNPACKED = ROOT / ".venv-clients" / "prometheus" / "usr" / "bin"
#: The objections of promtool to names of vLLM: recorded ones may have colons, exported ones not.
_COLON = "metric names should not contain ':'"
_HISTOGRAM = 'vllm:iteration_tokens_total non-counter metrics should not have "_total" suffix'


def _program(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=str(_UNPACKED))
    if found is None:
        # `.ci/run` sets it: a machine that can have Prometheus must try it.
        assert "TESTS_NEED_PROMETHEUS" not in os.environ, f"no {name}: run `make clients`"
        pytest.skip(f"no {name}: `make clients` unpacks it where there is apt-get")
    return found


def _promtool(*args: str, page: str | None = None) -> tuple[int, list[str]]:
    done = subprocess.run(
        [_program("promtool"), "check", *args],
        input=page,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return done.returncode, (done.stdout + done.stderr).splitlines()


@pytest.fixture(scope="module")
def exporting(start_tiny: Callable[..., Any]) -> Iterator[Any]:
    with start_tiny("--metrics-alias", "vllm") as daemon:
        yield daemon


def _ask(daemon: Any, **more: Any) -> None:
    body = {"prompt": "x", "max_tokens": 8, "ignore_eos": True, **more}
    httpx.post(f"{daemon.url}/v1/completions", json=body, timeout=TIMEOUT_S).raise_for_status()


def test_promtool_finds_no_fault_but_in_vllms_names(exporting: Any) -> None:
    _ask(exporting)
    lines = httpx.get(f"{exporting.url}/metrics", timeout=TIMEOUT_S).text.splitlines(keepends=True)
    ours = "".join(line for line in lines if "vllm:" not in line)
    assert _promtool("metrics", page=ours) == (0, [])
    _, said = _promtool("metrics", page="".join(lines))
    assert _HISTOGRAM in said
    assert [line for line in said if not line.endswith(_COLON) and line != _HISTOGRAM] == []


def test_the_shipped_configuration_is_valid() -> None:
    code, said = _promtool("config", str(CONFIGS / "prometheus.yml"))
    assert code == 0, said


class _Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, text: str) -> list[float]:
        """Return the values of an instant query; empty while there are none."""
        try:
            answer = httpx.get(
                f"{self.url}/api/v1/query", params={"query": text}, timeout=TIMEOUT_S
            )
        except httpx.TransportError:
            return []  # It is not up yet.
        if answer.status_code == 503:
            return []
        told = answer.json()
        assert told["status"] == "success", (text, told)
        return [float(sample["value"][1]) for sample in told["data"]["result"]]


@contextmanager
def _scraping(daemon: Any, folder: Path) -> Iterator[_Prometheus]:
    text = (CONFIGS / "prometheus.yml").read_text()
    assert "scrape_interval: 5s" in text
    text = text.replace("scrape_interval: 5s", "scrape_interval: 1s")
    text = text.replace("octavo:8000", daemon.url.removeprefix("http://"))
    (folder / "prometheus.yml").write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [_program("prometheus"), f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        try:
            yield _Prometheus(f"http://{address}")
        finally:
            process.terminate()
            process.wait(TIMEOUT_S)


def _panel_queries() -> list[str]:
    panels = json.loads((CONFIGS / "grafana.json").read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [
        text.replace("$__rate_interval", "1m").replace("$model", ".*") for text in found if text
    ]


def test_a_prometheus_scrapes_and_answers_the_dashboards_queries(
    exporting: Any, tmp_path: Path
) -> None:
    with _scraping(exporting, tmp_path) as prometheus:
        left = ["up == 1", "vllm:cache_config_info == 1", *_panel_queries()]
        assert len(left) > 30

        def all_have_data() -> bool:
            # So that there is something to draw between any two scrapes.
            _ask(exporting, n=2)
            left[:] = [text for text in left if not _has_data(prometheus.query(text))]
            return not left

        wait_until(all_have_data, left)


def _has_data(values: list[float]) -> bool:
    return bool(values) and not all(map(math.isnan, values))
