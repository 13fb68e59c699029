"""Hand-written SVG line charts: no plotting package, no script, colours from the page's CSS variables.

A chart is a title, a legend and axes that hold zero. Long curves are thinned to the means of equal stretches, noisy
ones drawn faint under their running mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from sdsearch_lightning.report.metrics import Point

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 38, 10, 8, 34
MAX_POINTS = 200
"""Points drawn per curve: more than the pixels of a chart help nobody and swell the page."""
SMOOTHING = 5
"""Points of the running mean, centred so that it does not lag behind."""
MAX_DOTS = 30
"""A curve of more points has no dots."""
DASHES = ("", "5 4")
"""Strokes of the first and second quantity where a colour is a run."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart."""

    label: str
    points: Sequence[Point]
    color: str
    """A CSS variable of the page, such as `--first`."""
    is_noisy: bool = False
    """Measured on a few rollouts per step: shown with its running mean."""
    dash: int = 0
    """Place in `DASHES`."""


@dataclass(frozen=True, slots=True)
class Legend:
    """What a chart's legend says of a curve, and the points that are drawn."""

    label: str
    color: str
    dash: str
    last: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart: its words, which the page escapes, and its SVG element."""

    title: str
    unit: str
    legend: Sequence[Legend]
    svg: str
    last_step: int
    """Where the horizontal axis ends."""


def figure(
    title: str, unit: str, curves: Sequence[Curve], *, last_step: int = 0, top: float | None = None
) -> Figure | None:
    """A chart, or None where no curve has a finite point.

    Args:
        title: what is shown.
        unit: of the vertical axis; stands behind the title.
        curves: lines over the step.
        last_step: the horizontal axis reaches at least this far, so that charts side by side share it.
        top: end of the vertical axis; None fits the data.
    """
    drawn = _drawn(curves)
    if not drawn:
        return None
    legend = [
        Legend(curve.label, curve.color, DASHES[curve.dash], short(points[-1].value), points) for curve, points in drawn
    ]
    svg = drawing(title, curves, last_step=last_step, top=top)
    return Figure(title, unit, legend, svg, max(last_step, 1, *(points[-1].step for _, points in drawn)))


def drawing(title: str, curves: Sequence[Curve], *, last_step: int = 0, top: float | None = None) -> str:
    """The SVG element of a chart, without caption and legend; arguments as of `figure`, some point finite."""
    drawn = _drawn(curves)
    everything = [point for _, points in drawn for point in points]
    last_step = max(last_step, 1, *(point.step for point in everything))
    x_ticks = [tick for tick in _ticks(0, last_step, smallest=1.0) if tick <= last_step]
    values = [point.value for point in everything]
    y_ticks = _ticks(min(values), top or max(values))
    scale = _Scale(last_step, y_ticks[0], y_ticks[-1])
    lines = "".join(_line(curve, points, scale) for curve, points in drawn)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{_axes(x_ticks, y_ticks, scale)}{lines}</svg>"
    )


@dataclass(frozen=True, slots=True)
class _Scale:
    """Maps data values to pixels of the drawing."""

    last_step: float
    bottom: float
    top: float

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / self.last_step

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.bottom) / (self.top - self.bottom)


def _drawn(curves: Sequence[Curve]) -> list[tuple[Curve, list[Point]]]:
    thinned = [(curve, _thinned(_finite(curve.points))) for curve in curves]
    return [(curve, points) for curve, points in thinned if points]


def _finite(points: Sequence[Point]) -> list[Point]:
    return sorted(point for point in points if math.isfinite(point.value))


def _thinned(points: list[Point]) -> list[Point]:
    stretch = math.ceil(len(points) / MAX_POINTS)
    parts = [points[start : start + stretch] for start in range(0, len(points), stretch or 1)]
    return [Point(part[-1].step, sum(point.value for point in part) / len(part)) for part in parts]


def _running_mean(points: Sequence[Point]) -> list[Point]:
    half = SMOOTHING // 2
    windows = (points[max(0, middle - half) : middle + half + 1] for middle in range(len(points)))
    means = (sum(point.value for point in window) / len(window) for window in windows)
    return [Point(point.step, mean) for point, mean in zip(points, means, strict=True)]


def _ticks(low: float, high: float, *, smallest: float = 0.0) -> list[float]:
    """At most seven round values that enclose 0, `low` and `high`."""
    low, high = min(low, 0.0), max(high, 0.0)
    extent = high - low or 1.0
    magnitude = 10.0 ** math.floor(math.log10(extent / 4))
    size = max(smallest, next(size * magnitude for size in (1, 2, 5, 10) if extent <= 5 * size * magnitude))
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [size * index for index in range(first, max(last, first + 1) + 1)]


def _axes(x_ticks: Sequence[float], y_ticks: Sequence[float], scale: _Scale) -> str:
    parts = []
    for tick in y_ticks:
        y = scale.y(tick)
        kind = "axis" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_tick(tick)}</text>')
    for tick in x_ticks:
        parts.append(f'<text x="{scale.x(tick):.1f}" y="{HEIGHT - 19}" text-anchor="middle">{_tick(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:g}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    return "".join(parts)


def _line(curve: Curve, points: Sequence[Point], scale: _Scale) -> str:
    mean = _running_mean(points) if curve.is_noisy and len(points) > SMOOTHING else []
    lines = _path(points, curve, scale, "faint" if mean else "line")
    if mean:
        lines += _path(mean, curve, scale, "line")
    if mean or len(points) > MAX_DOTS:
        return lines
    return lines + "".join(
        f'<circle class="dot" r="2.2" cx="{scale.x(point.step):.1f}" cy="{scale.y(point.value):.1f}" '
        f'style="fill:var({curve.color})"/>'
        for point in points
    )


def _path(points: Sequence[Point], curve: Curve, scale: _Scale, kind: str) -> str:
    corners = " ".join(f"{scale.x(point.step):.1f},{scale.y(point.value):.1f}" for point in points)
    dash = f";stroke-dasharray:{DASHES[curve.dash]}" if curve.dash else ""
    return f'<polyline class="{kind}" style="stroke:var({curve.color}){dash}" points="{corners}"/>'


def _tick(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e4 else f"{value / 1000:g}k"


def short(value: float) -> str:
    """A value in a legend: three decimals, none where it is large."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
