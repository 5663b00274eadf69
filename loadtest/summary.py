"""Figures as text: the tables on a terminal, and warnings for the reader. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from loadtest.disturbance import Disturbance
from loadtest.figures import PERCENTILES, Figures, Latencies, Spread
from loadtest.records import Header, Run, answered

#: Beyond these the generator may have slowed down the server.
_MUCH_CPU_SHARE = 0.5
_MUCH_LATENESS_S = 0.05
#: A larger deviation of the prompts from their requested length is reported.
_PROMPT_TOLERANCE = 0.02

LATENCY_NAMES = {
    "ttft": "first token",
    "itl": "inter-token",
    "tpot": "per token",
    "gap": "longest gap",
    "e2e": "whole answer",
}


def load_of(header: Header) -> str:
    """Return how hard a run pressed, in a word or two."""
    load = header.load
    if load.get("loop") == "closed":
        return f"{load['concurrency']} at a time"
    rate = load.get("rate_per_s")
    return f"{rate:g}/s, {load['arrivals']}" if rate else "as traced"


def lines(run: Run, found: Figures) -> Iterator[str]:
    """Yield the lines about one run."""
    header = run.header
    version = f" {header.server_version}" if header.server_version else ""
    yield f"{header.name}{version} · {header.model} · {header.workload}, {load_of(header)}"
    yield (
        f"{found.num_answered} of {found.num_requests} requests answered in "
        f"{found.duration_s:.2f} s; tokens a prompt {number(found.prompt_tokens.mean)}, "
        f"an answer {number(found.output_tokens.mean)}"
    )
    if found.num_answered:
        yield from _table(found)
        yield ", ".join(_rates(found))
    if found.disturbance is not None:
        yield _disturbed(found.disturbance)
    for kind, (how_many, message) in found.failures.items():
        yield f"failed: {how_many} x {kind}: {message}"
    yield from (f"note: {remark}" for remark in remarks(run, found))


def _table(found: Figures) -> Iterator[str]:
    rows = [["ms", "mean", *(f"p{percent}" for percent in PERCENTILES), "max"]]
    groups = {"": found.latencies} if not found.lanes else found.lanes
    for lane, latencies in groups.items():
        for key, name in LATENCY_NAMES.items():
            spread = spread_of(latencies, key)
            if spread.count:
                label = f"{lane}: {name}" if lane else name
                rows.append([label, *(number(value * 1e3) for value in values(spread))])
    yield from table(rows)


def spread_of(latencies: Latencies, key: str) -> Spread:
    """Return one of the latencies by the name `LATENCY_NAMES` has it under."""
    spread = getattr(latencies, key)
    assert isinstance(spread, Spread)
    return spread


def values(spread: Spread) -> list[float]:
    """Return mean, percentiles and maximum."""
    return [spread.mean, *(spread.percentiles[percent] for percent in PERCENTILES), spread.max]


def _rates(found: Figures) -> Iterator[str]:
    yield f"{found.output_tokens_per_s:.1f} output tokens/s"
    if found.prompt_tokens_per_s is not None:
        yield f"{found.prompt_tokens_per_s:.1f} prompt tokens/s"
    yield f"{found.requests_per_s:.2f} requests/s"
    if found.conversation_tokens_per_s.count:
        yield f"{found.conversation_tokens_per_s.mean:.1f} tokens/s a conversation"
    if found.cache_hit_rate is not None:
        yield f"{found.cache_hit_rate:.1%} of prompt tokens cached"
    if found.goodput is not None:
        yield f"goodput {found.goodput.per_s:.2f} requests/s ({found.goodput.share:.0%} in the SLO)"
    if found.json_share is not None:
        yield f"{found.json_share:.0%} JSON"


def _disturbed(found: Disturbance) -> str:
    alone, beside, worst = (
        number(value * 1e3)
        for value in (found.median_alone_s, found.median_beside_s, found.worst_beside_s)
    )
    return (
        f"{found.lane}: median gap {alone} ms alone, {beside} beside the others; "
        f"worst {worst} = {number(found.ratio)} times the one alone"
    )


def remarks(run: Run, found: Figures) -> Iterator[str]:
    """Yield warnings for readers of the figures."""
    yield from run.header.notes
    good = answered(run.records)
    if found.num_interrupted:
        yield f"{found.num_interrupted} requests were cut off by us and count nowhere"
    if found.num_short and found.json_share is None:
        yield f"{found.num_short} answers ended before max_tokens"
    if any(one.output_tokens is None for one in good):
        yield "the server tells no usage: each piece of text was counted as one token"
    if silent := sum(1 for one in good if not one.arrival_s):
        yield f"{silent} answers had no text, so they have no time to first token"
    asked = run.header.load.get("prompt_tokens")
    if asked and abs(found.prompt_tokens.mean / asked - 1) > _PROMPT_TOLERANCE:
        yield f"prompts have {found.prompt_tokens.mean:.1f} tokens instead of {asked}"
    cpu_share = run.measures.get("generator_cpu_s", 0.0) / (run.duration_s or math.inf)
    if cpu_share > _MUCH_CPU_SHARE:
        yield f"the load generator took {cpu_share:.0%} of a core"
    if (late_s := run.measures.get("generator_lateness_s", 0.0)) > _MUCH_LATENESS_S:
        yield f"the load generator sent up to {late_s * 1e3:.0f} ms late"


def number(value: float | None, digits: int = 1) -> str:
    """Return a number for a table; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.{digits}f}"


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows with columns under each other; the first column to the left, others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
