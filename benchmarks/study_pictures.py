"""Pictures of the study as SVG files of their own: forest plot and learning curves, in the look of report.html."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.measures import Difference
from sdsearch_lightning.report.charts import HEIGHT, WIDTH, Curve, drawing

COLORS = ("#2a78d6", "#d9601f", "#18794e", "#8e4ec6", "#c62a2f", "#9a7b00", "#0f8b8d", "#5f5e58")
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#5f5e58}.title{font-weight:600;fill:#1d1d1b}.grid{stroke:#e2e1dc}"
    ".axis{stroke:#5f5e58}.line{fill:none;stroke-width:2}.hit{opacity:0}svg{"
    + "".join(f"--c{index}:{color};" for index, color in enumerate(COLORS))
    + "}"
)
LABELS, PLOT, ROW, TOP, GAP = 240, 250, 20, 40, 60
"""Pixels of a forest plot: the column of labels, each plot, a row, the head, the space between plots."""


def color(index: int) -> str:
    """The CSS variable of the arm with this place in the protocol."""
    return f"--c{index % len(COLORS)}"


def curves_picture(panels: Sequence[tuple[str, Sequence[Curve]]]) -> str:
    """Charts side by side that share a legend; each panel is a title and curves over the step, from 0 to 1."""
    parts = []
    for index, (title, curves) in enumerate(panels):
        x = index * (WIDTH + GAP)
        place = f'<svg x="{x}" y="20" width="{WIDTH}" height="{HEIGHT}" '
        inner = drawing(title, curves, top=1.0).replace("<svg ", place)
        parts.append(f'<text class="title" x="{x}" y="14">{escape(title)}</text>{inner}')
    known = {curve.label: curve for _, own in panels for curve in own}
    for index, curve in enumerate(known.values()):
        y = HEIGHT + 36 + index * ROW
        parts.append(f'<rect x="8" y="{y - 9}" width="10" height="10" style="fill:var({curve.color})"/>')
        parts.append(f'<text x="24" y="{y}">{escape(curve.label)}</text>')
    return _picture(len(panels) * (WIDTH + GAP) - GAP, HEIGHT + 36 + len(known) * ROW, parts)


@dataclass(frozen=True, slots=True)
class ForestRow:
    """One line of a forest plot."""

    label: str
    color: str
    differences: Sequence[Difference | None]
    """One per plot; None leaves it empty."""


def forest_picture(titles: Sequence[str], rows: Sequence[ForestRow]) -> str:
    """Differences with their 95 % intervals, a column of labels and one plot per title, all on one scale around 0."""
    ends = [abs(d.mean) + (d.half_width or 0.0) for row in rows for d in row.differences if d is not None]
    reach = max(ends, default=0.0) * 1.05 or 1.0
    bottom = TOP + len(rows) * ROW
    parts = [f'<text x="0" y="{TOP + index * ROW + 4}">{escape(row.label)}</text>' for index, row in enumerate(rows)]
    for column, title in enumerate(titles):
        middle = LABELS + column * (PLOT + GAP) + PLOT / 2
        scale = PLOT / 2 / reach
        parts.append(f'<text class="title" x="{middle}" y="14" text-anchor="middle">{escape(title)}</text>')
        parts.append(f'<line class="axis" x1="{middle}" x2="{middle}" y1="24" y2="{bottom}"/>')
        for value in (-reach, 0.0, reach):
            x = middle + value * scale
            parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{value:+.2f}</text>')
        for index, row in enumerate(rows):
            if (found := row.differences[column]) is not None:
                parts.append(_interval(found, row, middle, scale, TOP + index * ROW))
    return _picture(LABELS + len(titles) * (PLOT + GAP), bottom + 24, parts)


def _interval(found: Difference, row: ForestRow, middle: float, scale: float, y: int) -> str:
    half, x = (found.half_width or 0.0) * scale, middle + found.mean * scale
    ends = f'x1="{x - half:.1f}" x2="{x + half:.1f}" y1="{y}" y2="{y}"'
    return (
        f'<line class="line" {ends} style="stroke:var({row.color})"/>'
        f'<circle r="4" cx="{x:.1f}" cy="{y}" style="fill:var({row.color})"><title>{escape(row.label)}: '
        f"{found.mean:+.3f}, n = {found.n}</title></circle>"
    )


def _picture(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}"><style>{STYLE}</style><rect width="100%" height="100%" fill="#ffffff"/>'
        f"{''.join(parts)}</svg>\n"
    )
