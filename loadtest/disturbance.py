"""The gaps that requests cause in the streams of the first lane. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from loadtest.records import Record


@dataclass(frozen=True, slots=True)
class Disturbance:
    """Gaps between arrivals of text in the first lane, in seconds; NaN where there are none."""

    lane: str
    #: While nothing of another lane was under way, and while something was.
    median_alone_s: float
    median_beside_s: float
    worst_beside_s: float

    @property
    def ratio(self) -> float:
        """The worst gap as a multiple of the median gap without disturbance."""
        return self.worst_beside_s / self.median_alone_s


def disturbance(good: Sequence[Record]) -> Disturbance | None:
    """Return how the lane of the first record was disturbed by others; None without others.

    A gap is beside a request if any of it lies between that one's sending and its end.
    """
    if not good or all(one.lane == good[0].lane for one in good):
        return None
    lane = good[0].lane
    others = [(one.sent_s, one.ended_s) for one in good if one.lane != lane]
    alone_s: list[float] = []
    beside_s: list[float] = []
    for one in good:
        for before_s, after_s in pairwise(one.arrival_s) if one.lane == lane else ():
            is_beside = any(sent_s < after_s and before_s < ended_s for sent_s, ended_s in others)
            (beside_s if is_beside else alone_s).append(after_s - before_s)
    return Disturbance(lane, _median(alone_s), _median(beside_s), max(beside_s, default=math.nan))


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan
