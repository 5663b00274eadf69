"""From records to the points of a plot. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loadtest.plot import Point
from loadtest.records import Record

_MOST_POINTS = 240
_MOST_BINS = 80


def cumulative(values: Sequence[float]) -> list[Point]:
    """Return the cumulative distribution of the values, at up to 240 places."""
    ordered = sorted(values)
    if not ordered:
        return []
    stride = max(1, math.ceil(len(ordered) / _MOST_POINTS))
    ranks = [*range(0, len(ordered) - 1, stride), len(ordered) - 1]
    return [(ordered[0], 0.0), *((ordered[rank], (rank + 1) / len(ordered)) for rank in ranks)]


def running(records: Sequence[Record]) -> list[Point]:
    """Return how many requests ran, at each moment that changed it, or the most of each bin."""
    changes = [(one.sent_s, 1) for one in records] + [(one.ended_s, -1) for one in records]
    level, points = 0, []
    for moment_s, change in sorted(changes):
        level += change
        points.append((moment_s, float(level)))
    return points if len(points) <= _MOST_POINTS else _highest(points)


def _highest(points: Sequence[Point]) -> list[Point]:
    width = points[-1][0] / _MOST_POINTS or 1.0
    highest: dict[int, float] = {}
    for moment, level in points:
        place = int(moment / width)
        highest[place] = max(level, highest.get(place, 0.0))
    return [(place * width, level) for place, level in sorted(highest.items())]


def token_rate(records: Sequence[Record]) -> list[Point]:
    """Return output tokens per second over time, in bins of equal width."""
    end_s = max((one.ended_s for one in records), default=0.0)
    if not end_s:
        return []
    # Wide enough that a bin holds several arrivals: else it shows nothing but their beat.
    num_arrivals = sum(len(one.arrival_s) for one in records)
    num_bins = max(8, min(_MOST_BINS, num_arrivals // 12))
    width_s = end_s / num_bins
    bins = [0.0] * num_bins
    for one in records:
        for moment_s, tokens in zip(one.arrival_s, one.arrival_tokens, strict=True):
            bins[min(num_bins - 1, int(moment_s / width_s))] += tokens
    return [*((i * width_s, tokens / width_s) for i, tokens in enumerate(bins)), (end_s, 0.0)]
