"""From records to figures: percentiles, rates, goodput, spread. Pure."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from loadtest.disturbance import Disturbance, disturbance
from loadtest.records import Record, Run, answered

PERCENTILES = (50, 90, 95, 99)

_UNITS_S = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}

#: The bounds of an SLO, each in seconds for one request.
SLO_KEYS = {
    "ttft": "time to first token",
    "tpot": "mean time per output token after the first",
    "itl": "99th percentile of the request's inter-token latencies",
    "gap": "longest wait between two arrivals of text",
    "e2e": "time to the end of the answer",
}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return a percentile of ascending values, between two of them by distance; NaN of none."""
    if not ordered:
        return math.nan
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True, slots=True)
class Spread:
    """How values are distributed; NaN where there are none."""

    count: int
    mean: float
    percentiles: Mapping[int, float]
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of the values."""
        ordered = sorted(values)
        return cls(
            len(ordered),
            statistics.fmean(ordered) if ordered else math.nan,
            {percent: percentile(ordered, percent) for percent in PERCENTILES},
            ordered[-1] if ordered else math.nan,
        )


@dataclass(frozen=True, slots=True)
class Latencies:
    """The waiting times of users, in seconds."""

    ttft: Spread
    #: Of all tokens after the first arrivals, all requests together.
    itl: Spread
    #: The mean of each request.
    tpot: Spread
    e2e: Spread
    #: Of requests: the longest each waited between two arrivals of text.
    gap: Spread


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that kept every bound of the SLO."""

    per_s: float
    share: float


@dataclass(frozen=True, slots=True)
class Figures:
    """All figures of one run. Rates count only answered requests."""

    num_requests: int
    num_answered: int
    num_interrupted: int
    #: Kind to how many, and the first message of each.
    failures: Mapping[str, tuple[int, str]]
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float | None
    #: Of each conversation with several answers: output tokens in the time that it waited for them.
    conversation_tokens_per_s: Spread
    latencies: Latencies
    #: Latencies of each lane, where there are several.
    lanes: Mapping[str, Latencies]
    #: Of the first lane by the others, where there are several.
    disturbance: Disturbance | None
    #: Tokens of prompts that were cached, of all; None if the server does not report it.
    cache_hit_rate: float | None
    prompt_tokens: Spread
    output_tokens: Spread
    #: Answers that ended before `max_tokens`.
    num_short: int
    #: Share of answers that are JSON; None if none was requested.
    json_share: float | None
    goodput: Goodput | None


def figures(run: Run) -> Figures:
    """Return the figures of a run."""
    good = answered(run.records)
    duration_s = run.duration_s or math.nan
    prompts = [one.prompt_tokens for one in good if one.prompt_tokens is not None]
    is_json = [one.is_json for one in good if one.is_json is not None]
    lanes = list(dict.fromkeys(one.lane for one in run.records))
    num_interrupted = sum(1 for one in run.records if one.failure and one.failure.is_ours)
    num_judged = len(run.records) - num_interrupted
    return Figures(
        num_requests=len(run.records),
        num_answered=len(good),
        num_interrupted=num_interrupted,
        failures=_failures(run.records),
        duration_s=run.duration_s,
        requests_per_s=len(good) / duration_s,
        output_tokens_per_s=sum(one.num_output_tokens for one in good) / duration_s,
        prompt_tokens_per_s=sum(prompts) / duration_s if prompts else None,
        conversation_tokens_per_s=Spread.of(_conversation_rates(good)),
        latencies=latencies(good),
        lanes={name: latencies([one for one in good if one.lane == name]) for name in lanes}
        if len(lanes) > 1
        else {},
        disturbance=disturbance(good),
        cache_hit_rate=_cache_hit_rate(good),
        prompt_tokens=Spread.of(prompts),
        output_tokens=Spread.of(one.num_output_tokens for one in good),
        num_short=sum(
            1
            for one in good
            if one.output_tokens is not None and one.output_tokens < one.max_tokens
        ),
        json_share=statistics.fmean(is_json) if is_json else None,
        goodput=_goodput(good, num_judged, run.header.slo, duration_s),
    )


def latencies(good: Sequence[Record]) -> Latencies:
    """Return how long the answered requests took."""
    return Latencies(
        ttft=Spread.of(one.ttft_s for one in good if one.ttft_s is not None),
        itl=Spread.of(itl_s for one in good for itl_s in one.itl_s()),
        tpot=Spread.of(one.tpot_s for one in good if one.tpot_s is not None),
        e2e=Spread.of(one.e2e_s for one in good),
        gap=Spread.of(max(gaps_s) for one in good if (gaps_s := one.gaps_s())),
    )


def _conversation_rates(good: Sequence[Record]) -> Iterator[float]:
    turns: dict[tuple[str, int], list[Record]] = {}
    for one in good:
        turns.setdefault((one.lane, one.conversation), []).append(one)
    for answers in turns.values():
        waited_s = sum(one.e2e_s for one in answers)
        if len(answers) > 1 and waited_s > 0:
            yield sum(one.num_output_tokens for one in answers) / waited_s


def _failures(records: Sequence[Record]) -> dict[str, tuple[int, str]]:
    theirs = [one.failure for one in records if one.failure and not one.failure.is_ours]
    first = {failure.kind: failure.message for failure in reversed(theirs)}
    counts = Counter(failure.kind for failure in theirs)
    return {kind: (number, first[kind]) for kind, number in counts.most_common()}


def _cache_hit_rate(good: Sequence[Record]) -> float | None:
    told = [one for one in good if one.cached_tokens is not None and one.prompt_tokens]
    if not told:
        return None
    return sum(one.cached_tokens or 0 for one in told) / sum(one.prompt_tokens or 0 for one in told)


def meets(record: Record, slo: Mapping[str, float]) -> bool:
    """Return whether an answered request kept every bound; a missing value keeps it."""
    itl_s = record.itl_s() if "itl" in slo else []
    taken: dict[str, float | None] = {
        "ttft": record.ttft_s,
        "tpot": record.tpot_s,
        "itl": percentile(sorted(itl_s), 99) if itl_s else None,
        "gap": max(record.gaps_s(), default=None),
        "e2e": record.e2e_s,
    }
    return all((value := taken[name]) is None or value <= bound for name, bound in slo.items())


def _goodput(
    good: Sequence[Record], num_judged: int, slo: Mapping[str, float], duration_s: float
) -> Goodput | None:
    if not slo:
        return None
    kept = sum(1 for one in good if meets(one, slo))
    return Goodput(kept / duration_s, kept / num_judged if num_judged else math.nan)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Paired ratios of a figure: each round's value over the baseline's in the same round."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]]) -> Ratio:
        """Return the ratios of (value, baseline); pairs without one are left out."""
        ratios = [value / base for value, base in pairs if base and math.isfinite(value / base)]
        if not ratios:
            return cls(math.nan, math.nan, math.nan, 0)
        return cls(statistics.median(ratios), min(ratios), max(ratios), len(ratios))


def parse_slo(text: str) -> dict[str, float]:
    """Read `ttft=500ms,itl=50ms` into seconds. Raises `ValueError`."""
    slo: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in SLO_KEYS:
            raise ValueError(f"{name or part!r} cannot be bounded; known are {', '.join(SLO_KEYS)}")
        slo[name] = parse_duration_s(value)
    return slo


def parse_duration_s(text: str) -> float:
    """Read `500ms`, `2s`, `1.5m` or `30` (seconds). Raises `ValueError`."""
    number = text.rstrip("msh")
    try:
        seconds = float(number) * _UNITS_S[text.removeprefix(number)]
    except (ValueError, KeyError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"{text!r} is no time; it looks like 500ms, 2s or 5m")
    return seconds
