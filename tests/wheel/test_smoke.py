"""The built wheel serves with nothing but its run-time requirements."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import termios
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import pytest
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.e2e

TIMEOUT_S = 120.0


@pytest.fixture
def start(start_daemon: Callable[..., Any], installed: Any) -> Callable[..., Any]:
    """Start the installed wheel, outside the checkout."""

    def started(*flags: str, **variables: str) -> Any:
        return start_daemon(
            *flags,
            program=[str(installed.octavo)],
            environ=installed.environ(**variables),
            folder=installed.python.parent,
        )

    return started


def _chat(url: str, model: str, **more: Any) -> dict[str, Any]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of Japan?"}],
        "temperature": 0,
        "max_tokens": 8,
        **more,
    }
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_nothing_is_there_that_only_development_brings(installed: Any) -> None:
    done = installed.run(
        "-c",
        "import importlib.metadata as m, importlib.util as u, json, sys;"
        "print(json.dumps([[one.name for one in m.distributions()],"
        "[name for name in sys.argv[1:] if u.find_spec(name)]]))",
        *(
            name
            for name, owners in metadata.packages_distributions().items()
            if not {canonicalize_name(owner) for owner in owners} & installed.distributions
        ),
    )
    assert done.returncode == 0, done.stderr
    distributions, importable = json.loads(done.stdout)
    assert {canonicalize_name(name) for name in distributions} == installed.distributions
    assert {"httpx", "psutil", "triton", "pytest"}.isdisjoint(installed.distributions)
    assert importable == []


def test_each_module_of_the_wheel_can_be_imported_without_the_extras(installed: Any) -> None:
    """But for kernels in Triton's language, which are imported where triton is."""
    code = """
import importlib, importlib.metadata as m
for file in sorted(m.files("octavo")):
    if file.suffix == ".py" and file.stem != "__main__":
        parts = file.with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(name, error.name)
"""
    done = installed.run("-c", code)
    assert done.stderr == ""
    assert done.stdout.split("\n") == [
        "model.attention.triton_code_kernels triton",
        "model.attention.triton_kernels triton",
        "model.attention.triton_tile_kernels triton",
        "model.cuda.coded_kernels triton",
        "model.cuda.kernels triton",
        "",
    ]


def test_the_default_model_is_served(start: Callable[..., Any], smollm2_file: Path) -> None:
    del smollm2_file  # It is fetched by now: the environment has no pip to fetch it with.
    with start() as daemon:
        [listed] = httpx.get(f"{daemon.url}/v1/models", timeout=TIMEOUT_S).json()["data"]
        answer = _chat(daemon.url, listed["id"])
        assert "Tokyo" in answer["choices"][0]["message"]["content"]
        schema = {"type": "object", "properties": {"city": {"enum": ["Tokyo", "Kyoto"]}}}
        form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
        structured = _chat(daemon.url, listed["id"], response_format=form, max_tokens=64)
        json.loads(structured["choices"][0]["message"]["content"])
        assert daemon.metric("octavo_generation_tokens_total") > 0
        assert daemon.stop() == 0
    assert "Traceback" not in "".join(daemon.log)


@pytest.mark.parametrize("implementation", ["octavo", "transformers"])
def test_a_model_of_the_hub_is_served(
    implementation: str,
    start: Callable[..., Any],
    hub: Any,
    model_files: dict[str, bytes],
    tmp_path: Path,
) -> None:
    hub.add("org/tiny", model_files)
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
    with start("org/tiny", "--model-impl", implementation, **variables) as daemon:
        assert _chat(daemon.url, "org/tiny")["usage"]["completion_tokens"] == 8
        assert daemon.stop() == 0
    log = "".join(daemon.log)
    assert re.search(r" INFO downloading org/tiny: 7 files, \S+ KiB, to ", log)
    assert "Traceback" not in log


def _screen(words: list[str], environ: dict[str, str]) -> tuple[int, str]:
    """Run a program with stderr on a terminal; return its exit code and its output."""
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (24, 100))
    process = subprocess.Popen(words, stderr=there, stdout=subprocess.DEVNULL, env=environ)
    os.close(there)
    shown = b""
    while True:
        try:
            chunk = os.read(here, 65536)
        except OSError:  # The end of a terminal.
            break
        if not chunk:
            break
        shown += chunk
    os.close(here)
    return process.wait(TIMEOUT_S), shown.decode()


def test_a_terminal_shows_a_bar_and_then_why_it_failed(
    installed: Any, hub: Any, tmp_path: Path
) -> None:
    """Here for an unknown architecture."""
    config = json.dumps({"architectures": ["Never"], "model_type": "never"}).encode()
    hub.add("org/never", {"config.json": config, "model.safetensors": bytes(2**20)})
    environ = installed.environ(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
    code, shown = _screen([installed.octavo, "serve", "--port", "0", "org/never"], environ)
    assert code == 1
    assert re.search(r"downloading org/never: 100%\|█+\| 1\.05M/1\.05M", shown)
    assert "Traceback" not in shown
    assert shown.splitlines()[-1].startswith("octavo: ")


def test_an_id_that_the_hub_does_not_have_is_one_line(
    installed: Any, hub: Any, tmp_path: Path
) -> None:
    environ = installed.environ(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
    code, shown = _screen([installed.octavo, "serve", "--port", "0", "org/absent"], environ)
    assert code == 1
    assert shown.splitlines()[-1] == (
        "octavo: model 'org/absent': no such file or folder here, and the hub has no such model "
        "(set HF_TOKEN if it is a private one); give a folder of safetensors, a .gguf file, "
        "a hub id (org/name), smollm2, dummy:CONFIG.json"
    )


def test_what_an_extra_brings_is_named_by_the_error(installed: Any, tmp_path: Path) -> None:
    done = installed.run("-c", "from model.cuda import ops as gpu_ops; print(gpu_ops.why_not())")
    assert done.stdout == "triton is not installed: pip install 'octavo[cuda]'\n"
    words = ["-m", "loadtest", "run", "--log-folder", str(tmp_path), "--start", "none {port}"]
    done = installed.run(*words)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"loadtest: psutil, .*, is not installed: pip install 'octavo\[loadtest\]'.*\n", done.stderr
    )
    # The load generator needs no extra for a running server.
    done = installed.run("-m", "loadtest", "run", "--url", "http://127.0.0.1:9", "--requests", "1")
    assert done.returncode == 1
    assert re.fullmatch(r"loadtest: http://127.0.0.1:9 .*\n", done.stderr)
