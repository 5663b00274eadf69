"""Records to a file and back, and to a page without other files."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loadtest.curves import cumulative, running, token_rate
from loadtest.figures import figures
from loadtest.page import page
from loadtest.plot import Axis, Series, chart
from loadtest.records import Failure, Record, RecordsError, Run, append, read
from loadtest.summary import lines

MakeRecord = Callable[..., Record]
MakeRun = Callable[..., Run]


@pytest.fixture
def runs(make_record: MakeRecord, make_run: MakeRun) -> list[Run]:
    def run(name: str, round_number: int | None, concurrency: int) -> Run:
        return make_run(
            make_record(0.5, 1.0, 1.25, prompt_tokens=9, cached_tokens=3),
            make_record(0.25, 2.0, is_json=True, lane="long"),
            make_record(1.0, failure=Failure("stream error", "<script>alert(1)</script>")),
            name=name,
            round=round_number,
            load={"loop": "closed", "concurrency": concurrency},
            slo={"ttft": 1.0},
            notes=("a & b",),
        )

    compared = [run(name, i, c) for i in (0, 1) for name in ("a<b", "c") for c in (1, 8)]
    return [*compared, run("alone", None, 4)]


def test_a_page_is_well_formed_and_needs_nobody(runs: list[Run]) -> None:
    text = page(runs)
    tree = ET.fromstring(text.removeprefix("<!DOCTYPE html>\n"))  # noqa: S314 - our own page
    tags = {element.tag for element in tree.iter()}
    assert {"svg", "table", "figure", "style"} <= tags
    assert tags.isdisjoint({"script", "link", "img", "iframe", "object"})
    attributes = {name for element in tree.iter() for name in element.attrib}
    assert attributes.isdisjoint({"href", "src", "srcset", "data", "action"})
    style = tree.findtext(".//style") or ""
    assert not re.search(r"url\(|@import|https?:", style)
    assert "prefers-color-scheme: dark" in style


def test_a_page_shows_every_part(runs: list[Run]) -> None:
    text = page(runs)
    for part in ("Time to first token", "Inter-token latency", "requests running", "c / a&lt;b"):
        assert part in text
    assert "1 failed, stream error: &lt;script&gt;" in text
    assert "a &amp; b" in text
    assert text.count("<figure>") == 2 + 2 + 2 * 5


def test_numbers_of_no_answer_are_dashes(make_record: MakeRecord, make_run: MakeRun) -> None:
    run = make_run(make_record(failure=Failure("reset", "gone")), duration_s=0.0)
    assert "nan" not in page([run]).lower()
    assert "0 of 1 requests answered" in "\n".join(lines(run, figures(run)))
    assert "nan" not in page([make_run(duration_s=0.0)]).lower()


def test_what_is_written_is_read(runs: list[Run], tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    append(path, runs[:2])
    append(path, runs[2:])
    assert read(path) == runs


def test_a_run_that_was_cut_off_is_left_out(runs: list[Run], tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    append(path, runs[:2])
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:-1]))
    assert read(path) == runs[:1]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"kind": "x"}', '{"kind": "end"}', '{"kind": "header", "format": 2}']
)
def test_a_wrong_file_is_told_with_its_line(line: str, runs: list[Run], tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    append(path, runs[:1])
    num_lines = len(path.read_bytes().splitlines())
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RecordsError, match=rf"runs.jsonl:{num_lines + 1}: not a line"):
        read(path)
    with pytest.raises(RecordsError, match="No such file"):
        read(tmp_path / "none")


def test_warnings(make_record: MakeRecord, make_run: MakeRun) -> None:
    run = make_run(
        make_record(1.0, 2.0, output_tokens=None, prompt_tokens=110),
        make_record(max_tokens=3, prompt_tokens=110),
        load={"loop": "open", "rate_per_s": 2.0, "arrivals": "poisson", "prompt_tokens": 100},
    )
    run.measures.update(generator_cpu_s=9.0, generator_lateness_s=0.2)
    told = "\n".join(lines(run, figures(run)))
    for part in (
        "each piece of text was counted as one token",
        "1 answers had no text",
        "1 answers ended before max_tokens",
        "prompts have 110.0 tokens instead of 100",
        "took 90% of a core",
        "sent up to 200 ms late",
        "2/s, poisson",
    ):
        assert part in told


# ---- points --------------------------------------------------------------------------------------


def test_shares() -> None:
    assert cumulative([3.0, 1.0]) == [(1.0, 0.0), (1.0, 0.5), (3.0, 1.0)]
    assert cumulative([]) == []
    many = cumulative([float(i) for i in range(10_000)])
    assert len(many) < 300
    assert many[-1] == (9999.0, 1.0)


def test_how_many_ran(make_record: MakeRecord) -> None:
    records = [make_record(2.0), make_record(3.0, sent_s=1.0), make_record(4.0, sent_s=2.0)]
    assert running(records) == [(0.0, 1), (1.0, 2), (2.0, 1), (2.0, 2), (3.0, 1), (4.0, 0)]
    many = [make_record(i + 1.0, sent_s=float(i)) for i in range(1000)]
    assert max(level for _, level in running(many)) == 1
    assert len(running(many)) < 300


def test_rates_add_up(make_record: MakeRecord) -> None:
    records = [make_record(*(i / 10 for i in range(1, 101))) for _ in range(3)]
    points = token_rate(records)
    width = points[1][0] - points[0][0]
    assert sum(rate for _, rate in points) * width == pytest.approx(300)
    assert token_rate([]) == []


def test_ticks_are_round() -> None:
    assert Axis("", 0.0, 10.0).ticks() == [0, 2, 4, 6, 8, 10]
    assert Axis("", 8.0, 300.0, is_log=True).ticks() == [10, 20, 50, 100, 200]
    assert Axis("", 0.5, 2e4, is_log=True).ticks() == [1, 10, 100, 1000, 10_000]
    assert Axis.of("", []).ticks() == Axis.of("", [1.0, 0.0]).ticks()


@pytest.mark.parametrize("is_log", [False, True])
def test_points_stay_within_the_picture(is_log: bool) -> None:
    values = [0.5, 7.0, 900.0]
    axis = Axis.of("", values, is_log=is_log)
    assert all(0 <= axis.place(value) <= 1 for value in values)
    assert axis.place(7.0) > axis.place(0.5)
    drawn = chart("title", [Series("s", [(v, v) for v in values], 0)], axis, axis)
    places = [float(one) for one in re.findall(r"[\d.]+", drawn.partition("points=")[2][:60])]
    assert len(places) >= 6


def test_a_single_value_has_an_axis() -> None:
    assert Axis.of("", [4.0], is_log=True).place(4.0) == pytest.approx(0.097, abs=0.01)
    assert 0 < Axis.of("", [4.0]).place(4.0) < 1


def test_curves_of_no_points_draw_nothing() -> None:
    axis: Any = Axis.of("", [])
    assert "polyline" not in chart("title", [Series("s", [], 0)], axis, axis)
