"""Plots as SVG, by hand: lines over axes. Pure; colours are the page's, as CSS classes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal, TypeAlias

WIDTH, HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 14, 40
#: How many colours the page has.
NUM_COLOURS = 6

Point: TypeAlias = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """One line. Its points have labels if they are few and worth pointing at."""

    name: str
    points: Sequence[Point]
    colour: int
    kind: Literal["line", "steps", "area"] = "line"
    labels: Sequence[str] = ()
    #: Dashes distinguish another line of the same colour.
    is_dashed: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values and how they are spread over a length."""

    label: str
    low: float
    high: float
    is_log: bool = False

    @classmethod
    def of(
        cls, label: str, values: Sequence[float], *, is_log: bool = False, from_zero: bool = True
    ) -> Axis:
        """Return an axis that holds all the values."""
        found = [one for one in values if math.isfinite(one) and (one > 0 or not is_log)]
        low, high = min(found, default=0.0), max(found, default=1.0)
        if is_log:
            low = low or 1.0
            return cls(label, low / 1.05, max(high, low * 1.5) * 1.05, is_log=True)
        low = 0.0 if from_zero else low
        return cls(label, low, high * 1.05 if high > low else low + 1.0)

    def place(self, value: float) -> float:
        """Return where a value is: 0 to 1."""
        if self.is_log:
            value = max(value, self.low)
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return round values within."""
        return self._log_ticks() if self.is_log else self._even_ticks()

    def _even_ticks(self) -> list[float]:
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(one * power for one in (1, 2, 5, 10) if one * power >= rough)
        first = math.ceil(self.low / step)
        last = math.floor(self.high / step)
        return [number * step for number in range(first, last + 1)]

    def _log_ticks(self) -> list[float]:
        low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        many = high - low > 3
        values = [10.0**p * m for p in range(low, high + 1) for m in ((1,) if many else (1, 2, 5))]
        return [value for value in values if self.low <= value <= self.high]


def chart(title: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Return a figure with a legend where there is more than one line."""
    body = "".join((*_grid(x, y), *(_line(one, x, y) for one in series)))
    legend = _legend(series) if len(series) > 1 else ""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{legend}"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{body}</svg></figure>"
    )


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.place(value) * (WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - axis.place(value) * (HEIGHT - _TOP - _BOTTOM)


def _grid(x: Axis, y: Axis) -> Iterator[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    for value in y.ticks():
        at = _y(y, value)
        yield f'<line class="grid" x1="{_LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>'
        yield f'<text class="tick end" x="{_LEFT - 6}" y="{at + 4:.1f}">{_tick(value)}</text>'
    for value in x.ticks():
        at = _x(x, value)
        yield f'<line class="grid" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{bottom}"/>'
        yield f'<text class="tick mid" x="{at:.1f}" y="{bottom + 16}">{_tick(value)}</text>'
    yield f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>'
    yield f'<text class="label end" x="{right}" y="{HEIGHT - 6}">{escape(x.label)}</text>'
    yield f'<text class="label" x="4" y="{_TOP - 3}">{escape(y.label)}</text>'


def _tick(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.0e}"


def _line(series: Series, x: Axis, y: Axis) -> str:
    if not series.points:
        return ""
    points = list(_corners(series.points)) if series.kind != "line" else list(series.points)
    path = " ".join(f"{_x(x, px):.1f},{_y(y, py):.1f}" for px, py in points)
    colour = f"c{series.colour % NUM_COLOURS}"
    dashes = " dashed" if series.is_dashed else ""
    drawn = (
        f'<polyline class="line {colour}{dashes}" points="{path}">{_told(series.name)}</polyline>'
    )
    if series.kind == "area":
        floor = f"{_y(y, y.low):.1f}"
        ends = f"{_x(x, points[0][0]):.1f},{floor}", f"{_x(x, points[-1][0]):.1f},{floor}"
        area = f'<polygon class="area {colour}" points="{ends[0]} {path} {ends[1]}"/>'
        drawn = area + drawn
    return drawn + "".join(_dots(series, x, y, colour))


def _corners(points: Sequence[Point]) -> Iterator[Point]:
    """Yield the corners of steps: a value holds until the next."""
    for (x0, y0), (x1, _) in pairwise(points):
        yield x0, y0
        yield x1, y0
    yield points[-1]


def _dots(series: Series, x: Axis, y: Axis, colour: str) -> Iterator[str]:
    for (px, py), label in zip(series.points, series.labels, strict=False):
        at_x, at_y = _x(x, px), _y(y, py)
        told = _told(f"{series.name}, {label}: {px:.4g}, {py:.4g}")
        yield f'<circle class="dot {colour}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="4">{told}</circle>'
        # Towards the middle, or it would be cut off at the edge.
        is_left = at_x < WIDTH * 0.7
        side, beside = ("tick", at_x + 6) if is_left else ("tick end", at_x - 6)
        yield f'<text class="{side}" x="{beside:.1f}" y="{at_y - 6:.1f}">{escape(label)}</text>'


def _told(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _legend(series: Sequence[Series]) -> str:
    items = "".join(
        f'<li><span class="key c{one.colour % NUM_COLOURS}{" dashed" if one.is_dashed else ""}">'
        f"</span>{escape(one.name)}</li>"
        for one in series
    )
    return f'<ul class="legend">{items}</ul>'
