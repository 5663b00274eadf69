"""Servers that are started for their turns: waited for, measured, and gone afterwards."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest

from loadtest.__main__ import main
from loadtest.records import read
from waiting import wait_until

_PYTHON = sys.executable


def test_one_that_ends_at_once_is_told_with_its_last_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "serve.py"
    script.write_text("print('no such model: x', flush=True)\nraise SystemExit(3)\n")
    command = f"{_PYTHON} {script} {{port}}"
    assert main(["run", "--start", command, "--log-folder", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "ended with 3 before it served" in told
    assert "no such model: x" in told


def test_one_that_cannot_be_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"{tmp_path / 'none'} {{port}}"
    assert main(["run", "--start", command, "--log-folder", str(tmp_path)]) == 1
    assert "cannot be started" in capsys.readouterr().err


def test_one_that_never_serves_is_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # It starts a child and waits for ever: both have to go.
    script = tmp_path / "serve.sh"
    script.write_text("tail -f /dev/null &\necho $!\nwait\n")
    flags = ["--log-folder", str(tmp_path), "--start-timeout", "3s", "--name", "mute"]
    assert main(["run", "--start", f"sh {script} {{port}}", *flags]) == 1
    assert "does not serve in time" in capsys.readouterr().err
    child = int((tmp_path / "mute.log").read_text())
    # No child of the server is left.
    wait_until(lambda: not _is_alive(child))


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.e2e
def test_two_real_daemons_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "vocab_size": 300,
                "max_position_embeddings": 512,
                "rms_norm_eps": 1e-5,
                "eos_token_id": 0,
            }
        )
    )
    serve = f"{_PYTHON} -m server serve dummy:{config} --port {{port}}"
    out = tmp_path / "out"
    argv = ["--start", f"first={serve}", "--start", f"second={serve} --max-num-seqs 2"]
    flags = ["--rounds", "1", "--requests", "4", "--max-tokens", "4", "--no-progress"]
    logs = ["--log-folder", str(tmp_path), "--out", str(out)]
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    assert main(["compare", *argv, *flags, *logs]) == 0
    runs = read(out)
    assert [run.header.name for run in runs] == ["first", "second"]
    for run in runs:
        assert all(one.failure is None for one in run.records)
        assert run.measures["ready_s"] > 0
        # Two processes, one of them with torch.
        assert run.measures["memory_bytes"] > 50 * 2**20
    assert "ready after s" in capsys.readouterr().out
    after = {process.pid for process in psutil.Process().children(recursive=True)}
    assert after <= before
