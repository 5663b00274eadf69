"""Statistics against values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from loadtest.compare import compared
from loadtest.figures import (
    Ratio,
    Spread,
    figures,
    meets,
    parse_duration_s,
    parse_slo,
    percentile,
)
from loadtest.records import Failure, Record, Run
from loadtest.summary import lines

MakeRecord = Callable[..., Record]
MakeRun = Callable[..., Run]


def test_percentiles_lie_between_values() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0], 90) == pytest.approx(3.7)
    assert percentile([5.0], 99) == 5.0
    assert math.isnan(percentile([], 50))


def test_a_spread() -> None:
    spread = Spread.of([4.0, 1.0, 3.0, 2.0])
    assert (spread.count, spread.mean, spread.max) == (4, 2.5, 4.0)
    assert spread.percentiles[95] == pytest.approx(3.85)
    assert Spread.of([]).count == 0


def test_latencies_of_one_request(make_record: MakeRecord) -> None:
    record = make_record(1.5, 1.6, 1.9, tokens=(1, 1, 2), due_s=1.0, sent_s=1.2, ended_s=2.0)
    assert record.ttft_s == 0.5  # From when it was due: sending late does not help a server.
    assert record.e2e_s == 1.0
    assert record.gaps_s() == pytest.approx([0.1, 0.3])
    assert record.itl_s() == pytest.approx([0.1, 0.15, 0.15])
    assert record.tpot_s == pytest.approx(0.4 / 3)


def test_one_arrival_has_no_time_between_tokens(make_record: MakeRecord) -> None:
    record = make_record(1.0)
    assert (record.tpot_s, record.itl_s(), record.gaps_s()) == (None, [], [])
    assert make_record().ttft_s is None


def test_tokens_shared_evenly_keep_the_whole_time(make_record: MakeRecord) -> None:
    record = make_record(0.0, 1.2, 3.6, tokens=(1.2, 1.2, 2.4))
    assert record.itl_s() == pytest.approx([1.0, 1.0, 1.0])


def test_figures_of_a_run(make_record: MakeRecord, make_run: MakeRun, reset: Failure) -> None:
    run = make_run(
        make_record(1.0, 2.0, 3.0, prompt_tokens=10, cached_tokens=4),
        make_record(2.0, 3.0, prompt_tokens=30, cached_tokens=6, max_tokens=5),
        make_record(0.5, failure=reset),
        make_record(failure=Failure("http 429", "busy")),
        make_record(failure=Failure("reset", "the second message")),
        make_record(9.0, failure=Failure("interrupted", "", is_ours=True)),
        slo={"ttft": 1.5},
    )
    found = figures(run)
    assert (found.num_requests, found.num_answered, found.num_interrupted) == (6, 2, 1)
    assert found.failures == {"reset": (2, "the first message"), "http 429": (1, "busy")}
    assert found.requests_per_s == 0.2
    assert found.output_tokens_per_s == 0.5
    assert found.prompt_tokens_per_s == 4.0
    assert found.cache_hit_rate == 0.25
    assert found.num_short == 1
    assert found.latencies.ttft.percentiles[50] == 1.5
    assert found.latencies.itl.count == 3
    assert found.goodput is not None
    assert (found.goodput.per_s, found.goodput.share) == (0.1, 0.2)


def test_lanes_are_told_apart(make_record: MakeRecord, make_run: MakeRun) -> None:
    found = figures(make_run(make_record(1.0, lane="a"), make_record(3.0, lane="b")))
    assert {name: one.ttft.mean for name, one in found.lanes.items()} == {"a": 1.0, "b": 3.0}
    assert not figures(make_run(make_record(1.0))).lanes


def test_streams_disturbed_by_another_lane(make_record: MakeRecord, make_run: MakeRun) -> None:
    run = make_run(
        make_record(1.0, 2.0, 3.0, 7.0, 9.0, 10.0, lane="streams", ended_s=10.0),
        # Its first gap ends as the long one is sent, its last begins when that one has ended.
        make_record(2.5, 3.5, 6.5, 8.5, 8.75, lane="streams", ended_s=8.75),
        make_record(8.5, lane="long", sent_s=3.5, ended_s=8.5),
    )
    found = figures(run)
    assert found.disturbance is not None
    assert found.disturbance.lane == "streams"
    assert found.disturbance.median_alone_s == 1.0
    assert found.disturbance.median_beside_s == 2.5
    assert found.disturbance.worst_beside_s == found.disturbance.ratio == 4.0
    told = "streams: median gap 1000.0 ms alone, 2500.0 beside the others; worst 4000.0 = 4.0 times"
    assert any(line.startswith(told) for line in lines(run, found))
    assert figures(make_run(*run.records[:2])).disturbance is None


def test_nothing_answered_is_no_number(make_run: MakeRun, make_record: MakeRecord) -> None:
    found = figures(make_run(make_record(failure=Failure("reset", "")), duration_s=0.0))
    assert found.num_answered == 0
    assert found.cache_hit_rate is None
    assert math.isnan(found.latencies.ttft.mean)


@pytest.mark.parametrize(
    ("slo", "is_kept"),
    [
        ("ttft=1s", True),
        ("ttft=999ms", False),
        ("gap=3s", True),
        ("gap=2s", False),
        ("tpot=2s,e2e=6s", True),
        ("tpot=2s,e2e=5s", False),
        ("itl=2.99s", True),
        ("itl=2.9s", False),
    ],
)
def test_bounds(make_record: MakeRecord, slo: str, is_kept: bool) -> None:
    # 99th percentile of the gaps 1, 1 and 3: 2 % before the last, so 2.96.
    record = make_record(1.0, 2.0, 3.0, 6.0)
    assert meets(record, parse_slo(slo)) is is_kept


@pytest.mark.parametrize(
    "slo", ["", "ttft", "ttft=", "ttft=0ms", "ttft=-1s", "speed=1s", "ttft=1x"]
)
def test_bounds_that_are_none(slo: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be bounded|no time"):
        parse_slo(slo)


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("2s", 2.0), ("1.5m", 90.0), ("1h", 3600.0), ("30", 30.0)]
)
def test_times(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


def test_ratios_are_paired() -> None:
    ratio = Ratio.of([(2.0, 1.0), (9.0, 3.0), (4.0, 4.0), (1.0, 0.0), (math.nan, 1.0)])
    assert (ratio.median, ratio.low, ratio.high, ratio.count) == (2.0, 1.0, 3.0, 3)
    assert Ratio.of([]).count == 0


def test_a_comparison_pairs_rounds(make_record: MakeRecord, make_run: MakeRun) -> None:
    def run(name: str, round_number: int, tokens: int) -> Run:
        return make_run(
            make_record(*map(float, range(tokens))), duration_s=1.0, name=name, round=round_number
        )

    # The machine is twice as fast in the second round; the ratio does not mind.
    runs = [run("a", 0, 10), run("b", 0, 5), run("a", 1, 20), run("b", 1, 10), run("a", 2, 40)]
    (found,) = compared([*runs, make_run(make_record(1.0))])
    assert (found.names, found.num_rounds) == (("a", "b"), 3)
    rate = next(row for row in found.rows if row.name == "output tokens/s")
    assert rate.medians == (20.0, 7.5)
    assert rate.ratios == (Ratio(0.5, 0.5, 0.5, 2),)


def test_the_rate_of_a_conversation_leaves_its_pauses_out(
    make_record: Callable[..., Record], make_run: Callable[..., Run]
) -> None:
    """Two answers of 10 tokens in one second each, with a pause of eight seconds between them."""
    first = make_record(0.5, 1.0, tokens=(5, 5))
    second = make_record(9.5, 10.0, tokens=(5, 5), turn=1, due_s=9.0, sent_s=9.0)
    alone = make_record(1.0, tokens=(99,), conversation=1)
    found = figures(make_run(first, second, alone)).conversation_tokens_per_s
    assert found.count == 1
    assert found.mean == pytest.approx(10.0)
