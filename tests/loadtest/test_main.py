"""The whole command against the real application on a model that can be computed by hand."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest import cli
from loadtest.__main__ import main
from loadtest.compare import Conditions, Contestant, compete
from loadtest.drive import Bounds, Driver
from loadtest.figures import figures
from loadtest.measure import Interruption
from loadtest.presets import PRESETS
from loadtest.prompts import Composer, Manner, Spelling
from loadtest.records import Run, read
from loadtest.target import Target
from loadtest.workloads import Shape
from waiting import TIMEOUT_S

_FAST = ("--no-progress", "--requests", "6", "--concurrency", "3", "--max-tokens", "5")


def _run(url: str, out: Path, *flags: str, code: int = 0) -> Run:
    assert main(["run", "--url", url, "--out", str(out), *_FAST, *flags]) == code
    return read(out)[-1]


def test_fixed_lengths_are_exact(
    app: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run(app.url, tmp_path / "out", "--slo", "ttft=20s")
    assert [one.failure for one in run.records] == [None] * 6
    assert {one.prompt_tokens for one in run.records} == {129}
    assert {one.output_tokens for one in run.records} == {5}
    assert {one.finish_reason for one in run.records} == {"length"}
    assert all(one.due_s == one.sent_s <= one.arrival_s[0] <= one.ended_s for one in run.records)
    assert all(sum(one.arrival_tokens) == pytest.approx(5) for one in run.records)
    header = run.header
    assert (header.model, header.server_version, header.workload) == ("fake", "0.0.t", "fixed")
    assert header.load["prompts"] == "token ids"
    assert header.host["cores"] >= 1
    found = figures(run)
    assert found.goodput is not None
    assert found.goodput.share == 1.0
    printed = capsys.readouterr().out
    assert "6 of 6 requests answered" in printed
    assert "goodput" in printed
    assert "first token" in printed


def test_a_seed_repeats_a_run(app: Any, tmp_path: Path) -> None:
    """Asked again with the same seed the prompts are cached; asked without one they are new."""
    flags = ("--prompt-tokens", "160", "--seed")
    _run(app.url, tmp_path / "out", *flags, "71")
    again = figures(_run(app.url, tmp_path / "out", *flags, "71"))
    assert again.cache_hit_rate is not None
    assert again.cache_hit_rate > 0.9
    new = figures(_run(app.url, tmp_path / "out", "--prompt-tokens", "160"))
    assert new.cache_hit_rate is not None
    assert new.cache_hit_rate < 0.1
    assert len(read(tmp_path / "out")) == 3


def test_a_shared_prefix_is_cached(app: Any, tmp_path: Path) -> None:
    found = figures(_run(app.url, tmp_path / "out", "--workload", "shared-prefix"))
    assert found.prompt_tokens.mean == 1064
    assert found.cache_hit_rate == pytest.approx(1000 / 1064, abs=0.02)


def test_turns_follow_each_other(app: Any, tmp_path: Path) -> None:
    run = _run(app.url, tmp_path / "out", "--workload", "multi-turn", "--requests", "2")
    for number in (0, 1):
        turns = [one for one in run.records if one.conversation == number]
        assert [one.turn for one in turns] == [0, 1, 2, 3, 4]
        lengths = [one.prompt_tokens or 0 for one in turns]
        # Each prompt has the one before it, the answer to that, and the new words.
        assert all(b > a + 5 for a, b in pairwise(lengths))
        assert all(b.sent_s >= a.ended_s for a, b in pairwise(turns))
        assert (turns[-1].cached_tokens or 0) > (turns[-2].prompt_tokens or 0) * 0.8


def test_agents_answer_and_go_on(app: Any, tmp_path: Path) -> None:
    flags = ("--workload", "agentic", "--prompt-tokens", "600", "--turns", "4", "--warmup", "0")
    run = _run(app.url, tmp_path / "out", *flags, "--requests", "2", "--concurrency", "2")
    assert [one.failure for one in run.records] == [None] * 8
    for number in (0, 1):
        turns = [one for one in run.records if one.conversation == number]
        assert [one.turn for one in turns] == list(range(4))
        assert all(after.sent_s >= before.ended_s + 0.2 for before, after in pairwise(turns))
        assert (turns[-1].cached_tokens or 0) > (turns[-2].prompt_tokens or 0) * 0.8
    assert figures(run).conversation_tokens_per_s.count == 2


def test_words_are_sent_where_text_is_asked_for(app: Any, tmp_path: Path) -> None:
    run = _run(app.url, tmp_path / "out", "--prompts", "text", "--prompt-tokens", "400")
    assert run.header.load["prompts"] == "text"
    # A byte is a token here, so that words are of different lengths: no more than near.
    assert figures(run).prompt_tokens.mean == pytest.approx(400, rel=0.15)
    assert any("words of" in note for note in run.header.notes)


def test_counts_of_each_piece(app: Any, tmp_path: Path) -> None:
    run = _run(app.url, tmp_path / "out", "--continuous-usage")
    assert {count for one in run.records for count in one.arrival_tokens} <= set(
        map(float, range(9))
    )
    assert figures(run).output_tokens.mean == 5


def test_lanes_run_side_by_side(app: Any, tmp_path: Path) -> None:
    run = _run(app.url, tmp_path / "out", "--workload", "long-among-decodes")
    found = figures(run)
    assert set(found.lanes) == {"streams", "long prompts"}
    assert found.disturbance is not None
    assert found.disturbance.lane == "streams"
    assert sum(1 for one in run.records if one.lane == "streams") == 6
    assert {one.prompt_tokens for one in run.records if one.lane == "long prompts"} == {1800}


@pytest.mark.parametrize("arrivals", ["poisson", "constant", "burst"])
def test_an_open_loop(app: Any, tmp_path: Path, arrivals: str) -> None:
    out = tmp_path / "out"
    flags = ("--no-progress", "--requests", "6", "--rate", "200", "--arrivals", arrivals)
    assert main(["run", "--url", app.url, "--out", str(out), "--max-tokens", "3", *flags]) == 0
    (run,) = read(out)
    assert len(run.records) == 6
    assert all(one.sent_s >= one.due_s for one in run.records)
    assert run.header.load["loop"] == "open"


def test_a_trace(app: Any, tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out"
    asked = [{"at_s": i / 100, "prompt": f"number {i}", "max_tokens": i + 1} for i in range(4)]
    trace.write_text("\n".join(map(json.dumps, asked)))
    assert main(["run", "--url", app.url, "--out", str(out), "--trace", str(trace)]) == 0
    (run,) = read(out)
    # A timer may be a millisecond early; then it was due when it was sent.
    assert [one.due_s for one in run.records] == pytest.approx([0.0, 0.01, 0.02, 0.03], abs=2e-3)
    assert [one.output_tokens for one in run.records] == [1, 2, 3, 4]


def test_several_loads_make_a_page(app: Any, tmp_path: Path) -> None:
    out, html = tmp_path / "out", tmp_path / "page.html"
    flags = ["--no-progress", "--max-tokens", "3", "--concurrency", "1,2,4", "--requests", "4"]
    assert main(["run", "--url", app.url, "--out", str(out), "--html", str(html), *flags]) == 0
    runs = read(out)
    assert [run.header.load["concurrency"] for run in runs] == [1, 2, 4]
    assert len({run.header.seed for run in runs}) == 3, (
        "or the second would find its prompts cached"
    )
    assert "Throughput against" in html.read_text()


def test_two_servers_in_turns(
    app: Any, start_app: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    servers = ["--server", f"a={app.url}", "--server", f"b={start_app().url}/v1"]
    flags = ["--rounds", "2", "--seed", "5", "--out", str(out), *_FAST]
    assert main(["compare", *servers, *flags]) == 0
    runs = read(out)
    assert [(run.header.name, run.header.round) for run in runs] == [
        ("a", 0),
        ("b", 0),
        ("a", 1),
        ("b", 1),
    ]
    assert [run.header.seed for run in runs] == [5, 5, 6, 6]
    printed = capsys.readouterr().out
    assert "b / a" in printed
    assert main(["report", str(out), "--html", str(tmp_path / "page.html")]) == 0
    assert "b / a" in (tmp_path / "page.html").read_text()


def test_a_key_is_sent_and_kept_out_of_the_records(
    start_app: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = start_app(api_key=["a-very-secret-key"]).url
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("LOADTEST_API_KEY", raising=False)
    assert main(["run", "--url", url, *_FAST]) == 1
    assert "API key" in capsys.readouterr().err
    monkeypatch.setenv("LOADTEST_API_KEY", "a-very-secret-key")
    _run(url, tmp_path / "out")
    assert "secret" not in (tmp_path / "out").read_text()


def test_failures_are_told_and_nothing_else_is_measured(
    app: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Small requests are taken, so that the server lets itself be tested; these never fit.
    run = _run(app.url, tmp_path / "out", "--warmup", "0", "--prompt-tokens", "9000", code=1)
    found = figures(run)
    assert (found.num_answered, found.num_requests) == (0, 6)
    assert found.failures["http 400"][0] == 6
    assert "failed: 6 x http 400: " in capsys.readouterr().out


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--url", "http://127.0.0.1:1"]) == 1
    assert "loadtest: http://127.0.0.1:1 does not answer" in capsys.readouterr().err


def test_a_failed_warm_up_ends_it(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--url", app.url, *_FAST, "--prompt-tokens", "9000"]) == 1
    assert "the warm-up failed: http 400" in capsys.readouterr().err


def test_an_interruption_keeps_what_there_is(app: Any, tmp_path: Path) -> None:
    """Ctrl-C once enough is generated to know that requests are measured."""

    def interrupt() -> None:
        metric = "octavo_request_success_total"
        with httpx.Client(base_url=app.url, timeout=TIMEOUT_S) as client:

            def ended() -> float:
                lines = client.get("/metrics").text.splitlines()
                return sum(float(one.split()[-1]) for one in lines if one.startswith(metric))

            until = ended() + 40
            while ended() < until and not is_over.is_set():
                pass
        os.kill(os.getpid(), signal.SIGINT)

    is_over = threading.Event()
    interrupter = threading.Thread(target=interrupt)
    out = tmp_path / "out"
    interrupter.start()
    flags = ["--no-progress", "--duration", "1h", "--concurrency", "3", "--max-tokens", "20"]
    code = main(["run", "--url", app.url, "--out", str(out), *flags])
    is_over.set()
    interrupter.join()
    assert code == 130
    (run,) = read(out)
    found = figures(run)
    assert found.num_answered > 10
    assert found.num_interrupted <= 3
    assert not found.failures


def test_progress_is_drawn_while_it_runs(app: Any) -> None:
    screen = io.StringIO()
    (plan,) = cli.parse(["run", "--requests", "300", "--max-tokens", "40"], {}).plans  # type: ignore[union-attr] # of `run`
    conditions = Conditions((plan,), 1, None, "", Path(), 1.0, screen)

    async def work() -> list[Run]:
        return [
            run async for run in compete([Contestant("ours", app.url)], conditions, Interruption())
        ]

    (run,) = asyncio.run(work())
    assert len(run.records) == 300
    drawn = screen.getvalue()
    assert "ours fixed" in drawn
    assert "/300" in drawn
    assert "tokens/s" in drawn


def test_an_open_loop_is_cut_off_while_it_waits(app: Any) -> None:
    """The next request is due in a day."""
    workload = PRESETS["c8"][1](Shape(max_tokens=2))
    composer = Composer("fake", workload, Spelling(token_ids=(1, 2)), Manner())

    async def work() -> Driver:
        driver = Driver(Target("ours", app.url), composer, Bounds(9))
        running = asyncio.create_task(driver.run_open(iter([0.0, 86400.0])))
        while not driver.records:  # noqa: ASYNC110 - the driver has no event for it
            await asyncio.sleep(0)
        driver.stop()
        await running
        driver.target.close()
        return driver

    assert len(asyncio.run(work()).records) == 1


def test_a_duration_ends_it(app: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--no-progress", "--duration", "100ms", "--concurrency", "2", "--max-tokens", "2"]
    assert main(["run", "--url", app.url, "--out", str(out), *flags]) == 0
    (run,) = read(out)
    assert max(one.sent_s for one in run.records) < 0.2
    assert "requests" not in run.header.load
