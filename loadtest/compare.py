"""Compares two or more servers under the same load, in turns.

In turns (A B A B), because the speed of a machine varies over time. Each round gives one ratio,
from runs at most minutes apart. The spread of the ratios shows how reliable their median is.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TextIO

from loadtest.figures import Figures, Ratio, figures
from loadtest.launch import Command, Started, started
from loadtest.measure import Interruption, measure
from loadtest.plan import Plan
from loadtest.records import Run
from loadtest.summary import load_of, number, table
from loadtest.target import Target

#: Compared figures: name, number of digits, and getter.
_ROWS: tuple[tuple[str, int, Callable[[Run, Figures], float | None]], ...] = (
    ("output tokens/s", 1, lambda _, f: f.output_tokens_per_s),
    ("tokens/s a conversation", 1, lambda _, f: f.conversation_tokens_per_s.mean),
    ("requests/s", 2, lambda _, f: f.requests_per_s),
    ("goodput requests/s", 2, lambda _, f: f.goodput.per_s if f.goodput else None),
    ("first token p50 ms", 1, lambda _, f: f.latencies.ttft.percentiles[50] * 1e3),
    ("first token p99 ms", 1, lambda _, f: f.latencies.ttft.percentiles[99] * 1e3),
    ("inter-token p50 ms", 2, lambda _, f: f.latencies.itl.percentiles[50] * 1e3),
    ("inter-token p99 ms", 2, lambda _, f: f.latencies.itl.percentiles[99] * 1e3),
    ("per token mean ms", 2, lambda _, f: f.latencies.tpot.mean * 1e3),
    ("longest gap p50 ms", 1, lambda _, f: f.latencies.gap.percentiles[50] * 1e3),
    ("whole answer p50 ms", 1, lambda _, f: f.latencies.e2e.percentiles[50] * 1e3),
    ("whole answer p99 ms", 1, lambda _, f: f.latencies.e2e.percentiles[99] * 1e3),
    ("cached share of prompts", 3, lambda _, f: f.cache_hit_rate),
    ("JSON share of answers", 3, lambda _, f: f.json_share),
    ("failed requests", 0, lambda _, f: float(sum(n for n, _ in f.failures.values()))),
    ("ready after s", 1, lambda r, _: r.measures.get("ready_s")),
    ("memory MiB", 0, lambda r, _: r.measures.get("memory_bytes", math.nan) / 2**20),
)


@dataclass(frozen=True, slots=True)
class Contestant:
    """A server by its URL, or by the command that starts it."""

    name: str
    where: str | Command


@dataclass(frozen=True, slots=True)
class Conditions:
    """The settings that all contestants share."""

    #: One run each, in this order, whenever it is a contestant's turn.
    plans: tuple[Plan, ...]
    num_rounds: int
    model: str | None
    api_key: str
    log_folder: Path
    start_timeout_s: float
    screen: TextIO | None


async def compete(
    contestants: Sequence[Contestant], conditions: Conditions, interruption: Interruption
) -> AsyncGenerator[Run, None]:
    """Yield each run as it ends. Raises `TargetError`."""
    is_comparison = len(contestants) > 1
    for round_number in range(conditions.num_rounds):
        for contestant in contestants:
            async with _turn(contestant, conditions) as (target, server):
                for plan in conditions.plans:
                    run = await measure(
                        target,
                        plan.of_round(round_number),
                        model=conditions.model,
                        interruption=interruption,
                        screen=conditions.screen,
                        round_number=round_number if is_comparison else None,
                    )
                    yield run if server is None else _with_cost(run, server)
                    if interruption.has_come:
                        return


@asynccontextmanager
async def _turn(
    contestant: Contestant, conditions: Conditions
) -> AsyncIterator[tuple[Target, Started | None]]:
    if isinstance(contestant.where, str):
        target = Target(contestant.name, contestant.where, conditions.api_key)
        try:
            yield target, None
        finally:
            target.close()
        return
    log = conditions.log_folder / f"{contestant.name}.log"
    start: Callable[[], AbstractAsyncContextManager[Started]] = partial(
        started,
        contestant.name,
        contestant.where,
        conditions.api_key,
        log,
        conditions.start_timeout_s,
    )
    async with start() as server:
        yield server.target, server


def _with_cost(run: Run, server: Started) -> Run:
    cost = {"ready_s": server.ready_s, "memory_bytes": float(server.memory_bytes())}
    return replace(run, measures=run.measures | cost)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of all contestants; the first is the one the others are compared with."""

    name: str
    digits: int
    #: Of each contestant, the median over the rounds.
    medians: tuple[float, ...]
    #: Of each but the first.
    ratios: tuple[Ratio, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All figures of all contestants under one load."""

    workload: str
    load: str
    names: tuple[str, ...]
    num_rounds: int
    rows: tuple[Row, ...]


def compared(runs: Sequence[Run]) -> list[Comparison]:
    """Group the runs by load and round. Other runs are left out."""
    loads: dict[tuple[str, str], list[tuple[Run, Figures]]] = {}
    for run in runs:
        if run.header.round is not None:
            key = (run.header.workload, load_of(run.header))
            loads.setdefault(key, []).append((run, figures(run)))
    return [
        _comparison(workload, load, found)
        for (workload, load), found in loads.items()
        if len({run.header.name for run, _ in found}) > 1
    ]


def _comparison(workload: str, load: str, found: Sequence[tuple[Run, Figures]]) -> Comparison:
    names = tuple(dict.fromkeys(run.header.name for run, _ in found))
    rows = []
    for label, digits, take in _ROWS:
        by_name: dict[str, dict[int, float]] = {name: {} for name in names}
        for run, one in found:
            value = take(run, one)
            if value is not None and math.isfinite(value) and run.header.round is not None:
                by_name[run.header.name][run.header.round] = value
        if any(by_name.values()):
            rows.append(_row(label, digits, [by_name[name] for name in names]))
    num_rounds = len({run.header.round for run, _ in found})
    return Comparison(workload, load, names, num_rounds, tuple(rows))


def _row(label: str, digits: int, rounds: Sequence[dict[int, float]]) -> Row:
    base, *others = rounds
    return Row(
        label,
        digits,
        tuple(_median(list(values.values())) for values in rounds),
        tuple(
            Ratio.of((values[r], base[r]) for r in sorted(values.keys() & base.keys()))
            for values in others
        ),
    )


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    if not ordered:
        return math.nan
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def lines(comparison: Comparison) -> Iterator[str]:
    """Yield a table: medians over the rounds, and the ratios with their spread."""
    first, *others = comparison.names
    yield (
        f"{comparison.workload}, {comparison.load}; medians of {comparison.num_rounds} rounds in "
        "turns, ratios paired by round: median [lowest, highest]"
    )
    head = ["", *comparison.names, *(f"{name} / {first}" for name in others)]
    body = [
        [
            row.name,
            *(number(value, row.digits) for value in row.medians),
            *(ratio_text(ratio) for ratio in row.ratios),
        ]
        for row in comparison.rows
    ]
    yield from table([head, *body])


def ratio_text(ratio: Ratio) -> str:
    """Return a ratio with its spread; a dash where there is none."""
    if not ratio.count:
        return "-"
    return f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
