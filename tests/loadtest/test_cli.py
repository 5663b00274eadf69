"""Errors of the command line are one line, before anything is sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.cli import LoadCommand, ReportCommand, parse
from loadtest.compare import Contestant
from loadtest.launch import Command


def _load(*argv: str, **environ: str) -> LoadCommand:
    asked = parse(argv, environ)
    assert isinstance(asked, LoadCommand)
    return asked


def test_defaults() -> None:
    asked = _load("run")
    assert asked.contestants == (Contestant("http://127.0.0.1:8000", "http://127.0.0.1:8000"),)
    (plan,) = asked.plans
    assert plan.workload == "c8"
    assert asked.outputs.has_progress
    assert plan.num_warm_ups(plan.make_workload()) == 8
    (other,) = _load("run").plans
    assert other.seed != plan.seed, "two runs ask other words"


def test_servers_keep_the_order_they_are_given_in() -> None:
    argv = [
        "--start",
        "a=./serve --port {port}",
        "--server",
        "b=http://h:1",
        "--start",
        "c=x {port}",
    ]
    asked = _load("compare", *argv)
    assert asked.contestants == (
        Contestant("a", Command(("./serve", "--port", "{port}"))),
        Contestant("b", "http://h:1"),
        Contestant("c", Command(("x", "{port}"))),
    )
    assert _load("run", "--start", "a/b --port={port}").contestants[0].name == "b"


def test_keys() -> None:
    assert _load("run").api_key == ""
    assert _load("run", OPENAI_API_KEY="o").api_key == "o"
    assert _load("run", OPENAI_API_KEY="o", LOADTEST_API_KEY="l").api_key == "l"
    assert _load("run", "--api-key", "f", OPENAI_API_KEY="o").api_key == "f"


def test_a_report() -> None:
    asked = parse(["report", "a", "b", "--html", "c"], {})
    assert asked == ReportCommand((Path("a"), Path("b")), Path("c"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["run", "--speed-limit", "3"], "--speed-limit"),
        (["run", "--url", "host:80"], "http://127.0.0.1:8000"),
        (["run", "--url", "http://host:99999"], "out of range"),
        (["run", "--workload", "c9"], "c9"),
        (["run", "--concurrency", "8,0"], "'0' is no whole number from 1"),
        (["run", "--concurrency", "9999"], "at most 4096"),
        (["run", "--concurrency", "1", "--rate", "1"], "give one of them"),
        (["run", "--rate", "0"], "no number above 0"),
        (["run", "--requests", "1e3"], "no whole number"),
        (["run", "--warmup", "-1"], "--warmup"),
        (["run", "--duration", "soon"], "'soon' is no time"),
        (["run", "--slo", "speed=1s"], "'speed' cannot be bounded"),
        (["run", "--extra", "[]"], "must be a JSON object"),
        (["run", "--extra", "{"], "--extra"),
        (["run", "--workload", "trace"], "needs --trace"),
        (["run", "--workload", "c1", "--trace", "x"], "leave --workload out"),
        (["run", "--trace", "x", "--rate", "1"], "--speed changes that"),
        (["run", "--trace", "no-such-file"], "no-such-file"),
        (["run", "--workload", "multi-turn", "--endpoint", "completions"], "endpoint chat"),
        (["run", "--workload", "long-among-decodes", "--rate", "1"], "takes no --rate"),
        (["run", "--start", "serve"], "{port}"),
        (["run", "--api-key", "a\nb"], "printable ASCII"),
        (["compare", "--server", "a=http://h"], "at least two servers"),
        (["compare", "--server", "a=http://h", "--server", "a=http://i"], "different names"),
        (["compare", "--server", "http://h"], "NAME="),
        (["report"], "FILE"),
    ],
)
def test_wrong_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(argv, {})
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_help_names_every_workload(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["run", "--help"], {})
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert "long-among-decodes" in told
    assert "LOADTEST_API_KEY" in told
