"""Recorded runs as one HTML page: tables and plots, nothing loaded from anywhere. Pure.

It is well-formed XML too, so that a machine can read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from loadtest import compare
from loadtest.curves import cumulative, running, token_rate
from loadtest.figures import Figures, figures
from loadtest.plot import Axis, Series, chart
from loadtest.records import Run, answered
from loadtest.style import STYLE
from loadtest.summary import LATENCY_NAMES, load_of, number, remarks, spread_of, values


@dataclass(frozen=True, slots=True)
class _Group:
    """All runs of one server under one load: one, or the rounds of a comparison."""

    title: str
    server: str
    colour: int
    runs: tuple[Run, ...]
    found: tuple[Figures, ...]


def page(runs: Sequence[Run]) -> str:
    """Return the page."""
    title = "Load test"
    sections = "".join(_sections(runs))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{title}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>{title}</h1>{_facts(runs)}{sections}</main></body></html>\n"
    )


def _facts(runs: Sequence[Run]) -> str:
    headers = [run.header for run in runs]
    dates = sorted({header.date for header in headers})
    host = headers[0].host
    facts = [
        dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
        f"{host.get('cpu')}, {host.get('cores')} cores, {host.get('system')}",
        *sorted({f"commit {header.commit}" for header in headers if header.commit}),
    ]
    return f'<p class="facts">{escape(" · ".join(facts))}</p>'


def _sections(runs: Sequence[Run]) -> Iterator[str]:
    for comparison in compare.compared(runs):
        yield _comparison(comparison)
    servers = list(dict.fromkeys(run.header.name for run in runs))
    for workload in dict.fromkeys(run.header.workload for run in runs):
        groups = _groups([run for run in runs if run.header.workload == workload], servers)
        yield f"<section><h2>{escape(workload)}</h2>"
        yield _overview(groups)
        yield '<div class="plots">'
        yield _distribution("Time to first token: share of requests within", groups, "ttft")
        yield _distribution("Inter-token latency: share of tokens within", groups, "itl")
        yield from _trade_off(groups)
        for group in groups:
            yield from _timeline(group)
        yield "</div></section>"


def _groups(runs: Sequence[Run], servers: Sequence[str]) -> list[_Group]:
    by_title: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        by_title.setdefault((run.header.name, load_of(run.header)), []).append(run)
    has_loads = len({load for _, load in by_title}) > 1
    groups: list[_Group] = []
    for (name, load), found in by_title.items():
        # One colour a server; where there is but one, one a load.
        colour = servers.index(name) if len(servers) > 1 else len(groups)
        title = f"{name}, {load}" if has_loads else name
        groups.append(_Group(title, name, colour, tuple(found), tuple(map(figures, found))))
    return groups


# ---- tables --------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the first cell of each row is its name."""
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _comparison(found: compare.Comparison) -> str:
    first, *others = found.names
    head = ["", *found.names, *(f"{name} / {first}" for name in others)]
    rows = [
        [
            row.name,
            *(number(value, row.digits) for value in row.medians),
            *(compare.ratio_text(ratio) for ratio in row.ratios),
        ]
        for row in found.rows
    ]
    return (
        f"<section><h2>{escape(' against '.join(found.names))}</h2>"
        f"<p>{escape(found.workload)}, {escape(found.load)}. Medians of {found.num_rounds} rounds, "
        "the servers in turns; ratios are paired by round: median [lowest, highest].</p>"
        f"{_table(head, rows)}</section>"
    )


def _overview(groups: Sequence[_Group]) -> str:
    latency_heads = [f"{name} {p}, ms" for name in ("first token", "inter-token") for p in _SHOWN]
    head = ["", "answered", "failed", "output tokens/s", *latency_heads, "cached", "goodput/s"]
    rows = []
    notes: dict[str, None] = {}
    for group in groups:
        for run, found in zip(group.runs, group.found, strict=True):
            which = "" if run.header.round is None else f", round {run.header.round + 1}"
            rows.append([group.title + which, *_overview_cells(found)])
            notes |= {f"{group.title}: {remark}": None for remark in remarks(run, found)}
            for kind, (how_many, message) in found.failures.items():
                notes[f"{group.title}{which}: {how_many} failed, {kind}: {message}"] = None
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    told = f'<ul class="notes">{items}</ul>' if items else ""
    return f"{_table(head, rows)}{told}{''.join(map(_details, groups))}"


_SHOWN = ("p50", "p99")


def _overview_cells(found: Figures) -> Iterator[str]:
    yield f"{found.num_answered}"
    yield f"{found.num_requests - found.num_answered - found.num_interrupted}"
    yield number(found.output_tokens_per_s)
    for spread in (found.latencies.ttft, found.latencies.itl):
        yield number(spread.percentiles[50] * 1e3)
        yield number(spread.percentiles[99] * 1e3)
    yield "-" if found.cache_hit_rate is None else f"{found.cache_hit_rate:.1%}"
    yield "-" if found.goodput is None else number(found.goodput.per_s, 2)


def _details(group: _Group) -> str:
    """Return all latencies of the group's first run, folded away."""
    run, found = group.runs[0], group.found[0]
    lanes = found.lanes or {"": found.latencies}
    rows = [
        [f"{lane}: {name}" if lane else name, *(number(v * 1e3) for v in values(spread))]
        for lane, latencies in lanes.items()
        for key, name in LATENCY_NAMES.items()
        if (spread := spread_of(latencies, key)).count
    ]
    head = ["ms", "mean", "p50", "p90", "p95", "p99", "max"]
    about = f"{run.header.model}, version {run.header.server_version}, {run.header.load}"
    return (
        f"<details><summary>{escape(group.title)}: all latencies</summary>"
        f"<p>{escape(about)}, seed {run.header.seed}</p>{_table(head, rows)}</details>"
    )


# ---- plots ---------------------------------------------------------------------------------------


def _distribution(title: str, groups: Sequence[_Group], kind: str) -> str:
    series: list[Series] = []
    for group in groups:
        good = answered([record for run in group.runs for record in run.records])
        samples = (
            [one.ttft_s for one in good if one.ttft_s is not None]
            if kind == "ttft"
            else [itl_s for one in good for itl_s in one.itl_s()]
        )
        points = cumulative([sample_s * 1e3 for sample_s in samples])
        # Of one server several loads have its colour: dashes tell them apart.
        is_dashed = any(one.colour == group.colour for one in series)
        series.append(Series(group.title, points, group.colour, "steps", is_dashed=is_dashed))
    x = Axis.of("ms", [x for one in series for x, _ in one.points], is_log=True)
    return chart(title, series, x, Axis("share", 0.0, 1.0))


def _trade_off(groups: Sequence[_Group]) -> Iterator[str]:
    """Yield throughput against latency, where a server was put under several loads."""
    by_server: dict[str, list[_Group]] = {}
    for group in groups:
        by_server.setdefault(group.server, []).append(group)
    if max(map(len, by_server.values())) < 2:
        return
    for key, label in (("ttft", "first token p50, ms"), ("itl", "inter-token p50, ms")):
        series = []
        for i, (server, loads) in enumerate(by_server.items()):
            points = [(_mean_rate(one), _median_ms(one, key)) for one in loads]
            labels = [load_of(one.runs[0].header) for one in loads]
            series.append(Series(server, points, i, labels=labels))
        everything = [point for one in series for point in one.points]
        x = Axis.of("output tokens/s", [x for x, _ in everything])
        y = Axis.of(label, [y for _, y in everything])
        yield chart(f"Throughput against {LATENCY_NAMES[key]} latency", series, x, y)


def _mean_rate(group: _Group) -> float:
    return sum(one.output_tokens_per_s for one in group.found) / len(group.found)


def _median_ms(group: _Group, key: str) -> float:
    medians = [spread_of(one.latencies, key).percentiles[50] for one in group.found]
    return sum(medians) / len(medians) * 1e3


def _timeline(group: _Group) -> Iterator[str]:
    """Yield the plots of the group's first run over time."""
    records = group.runs[0].records
    levels, rates = running(records), token_rate(records)
    if not levels:
        return
    x = Axis("s", 0.0, max(one.ended_s for one in records) or 1.0)
    for title, points in (("requests running", levels), ("output tokens/s", rates)):
        series = Series(title, points, group.colour, "area" if points is levels else "steps")
        y = Axis.of(title, [value for _, value in points])
        yield chart(f"{group.title}: {title}", [series], x, y)
