"""Line charts as inline SVG: a few kilobytes each, sharp at any size, in the page's own colours.

The page's style sheet colours the classes; its script reads `data-steps` and `data-values` to show what lies under the
pointer. A chart is drawn 400 units wide and shown about as wide in pixels, so that its labels are as large as text.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from latentloom.report.numbers import log_ticks, number, round_ticks

Points = list[tuple[int, float]]
"""Steps in rising order, each with a finite value."""

WIDTH, HEIGHT = 400, 228
LEFT, RIGHT, TOP, BOTTOM = 50, 388, 18, 204
CURVE_POINTS, MARKS, DOTTED = 1000, 200, 24
COLOURS = 7  # that the style sheet knows


@dataclass(frozen=True, kw_only=True)
class Chart:
    title: str
    curves: list[tuple[str, Points]]
    """Name and points of each; none is empty."""
    unit: str = ""
    log: bool = False
    """A logarithmic axis, where all that is shown is positive."""
    from_zero: bool = False
    levels: list[tuple[str, float]] = field(default_factory=list)
    """Named values that curves are read against, as horizontal lines."""
    best: tuple[int, float] | None = None
    marks: Points = field(default_factory=list)
    mark_name: str = "spike"
    resumed: list[int] = field(default_factory=list)
    """Steps at which the run was taken up again."""
    note: str = ""
    """A sentence below the chart."""


def thinned(points: Points, limit: int = CURVE_POINTS) -> Points:
    """At most `limit` of the points: the first, the last, and the lowest and highest of equal stretches between."""
    if len(points) <= limit:
        return points
    inner, buckets = points[1:-1], max(1, (limit - 2) // 2)
    kept = [points[0]]
    for i in range(buckets):
        stretch = inner[i * len(inner) // buckets : (i + 1) * len(inner) // buckets]
        ends = {
            min(range(len(stretch)), key=lambda j: stretch[j][1]),
            max(range(len(stretch)), key=lambda j: stretch[j][1]),
        }
        kept += [stretch[j] for j in sorted(ends)]
    return [*kept, points[-1]]


def draw(chart: Chart) -> str:
    """The chart as a `<figure>` with its title, legend and note."""
    values = [value for _, points in chart.curves for _, value in points] + [value for _, value in chart.marks]
    shown = values + [level for _, level in chart.levels]
    log = chart.log and min(shown) > 0
    low, high = _bounds(shown, log, chart.from_zero)
    last = max([step for points in (*(points for _, points in chart.curves), chart.marks) for step, _ in points] + [1])

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / last

    def y(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return BOTTOM - (BOTTOM - TOP) * share

    ticks = log_ticks(low, high, 5) if log else round_ticks(low, high, 5)
    parts = [_axes(ticks, round_ticks(0, last, 5), x, y)]
    parts += [_resumption(x(step)) for step in chart.resumed if step <= last]
    parts += [f'<path class="level" d="M{LEFT} {y(value):.1f}H{RIGHT}"/>' for _, value in chart.levels]
    parts += [_curve(i, name, points, x, y) for i, (name, points) in enumerate(chart.curves)]
    parts += [_mark(step, value, x(step), y(value)) for step, value in thinned(chart.marks, MARKS)]
    if chart.best is not None:
        parts.append(_best(x(chart.best[0]), y(chart.best[1])))
    unit = f' <span class="unit">{escape(chart.unit)}</span>' if chart.unit else ""
    scale = ' <span class="unit">log scale</span>' if log else ""
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    return (
        f'<figure class="chart"><figcaption><h4>{escape(chart.title)}{unit}{scale}</h4>{_legend(chart)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_said(chart))}" data-unit="{escape(chart.unit)}">'
        f"{''.join(parts)}"
        f'<line class="pointer" y1="{TOP}" y2="{BOTTOM}" x1="0" x2="0"/></svg>{note}</figure>'
    )


def _bounds(values: Sequence[float], log: bool, from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** 0.05, 1.02)
        return low / room, high * room
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return (min(0.0, low) if from_zero else low - room), high + room


def _axes(ticks: list[float], steps: list[float], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    lines = "".join(f'<path d="M{LEFT} {y(tick):.1f}H{RIGHT}"/>' for tick in ticks)
    values = "".join(f'<text x="{LEFT - 7}" y="{y(tick) + 4:.1f}">{number(tick)}</text>' for tick in ticks)
    along = "".join(f'<text x="{x(step):.1f}" y="{BOTTOM + 18}">{_short(step)}</text>' for step in steps)
    return (
        f'<g class="grid">{lines}</g><path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>'
        f'<g class="ticks y">{values}</g><g class="ticks x">{along}</g>'
        f'<g class="ticks y"><text x="{LEFT - 16}" y="{BOTTOM + 18}">step</text></g>'
    )


def _short(step: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if step >= 10 * size or (step >= size and letter == "M"):
            return number(step / size) + letter
    return number(step)


def _curve(i: int, name: str, points: Points, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    kept = thinned(points)
    places = [f"{x(step):.1f},{y(value):.1f}" for step, value in kept]
    dots = "".join('<circle cx="{}" cy="{}" r="2.2"/>'.format(*place.split(",")) for place in places)
    steps, values = " ".join(str(step) for step, _ in kept), " ".join(f"{value:.6g}" for _, value in kept)
    return (
        f'<g class="curve c{i % COLOURS}" data-name="{escape(name)}" data-steps="{steps}" data-values="{values}">'
        f'<polyline points="{" ".join(places)}"/>{dots if len(kept) <= DOTTED else ""}</g>'
    )


def _resumption(x: float) -> str:
    return f'<g class="resumed"><title>taken up again</title><path d="M{x:.1f} {TOP}V{BOTTOM}"/></g>'


def _mark(step: int, value: float, x: float, y: float) -> str:
    return f'<path class="mark" d="M{x:.1f} {y - 5:.1f}l4.5 8h-9z"><title>step {step:,}: {number(value)}</title></path>'


def _best(x: float, y: float) -> str:
    beside, anchor = (x + 9, "start") if x < RIGHT - 60 else (x - 9, "end")
    return (
        f'<g class="best"><circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
        f'<text x="{beside:.1f}" y="{y - 8:.1f}" text-anchor="{anchor}">best</text></g>'
    )


def _legend(chart: Chart) -> str:
    entries = [f'<li class="c{i % COLOURS}">{escape(name)}</li>' for i, (name, _) in enumerate(chart.curves)]
    entries += [f'<li class="level">{escape(name)}</li>' for name, _ in chart.levels]
    if chart.marks:
        entries.append(f'<li class="mark">{escape(chart.mark_name)}</li>')
    if chart.resumed:
        entries.append('<li class="resumed">taken up again</li>')
    return f'<ul class="legend">{"".join(entries)}</ul>' if len(entries) > 1 else ""


def _said(chart: Chart) -> str:
    """What the chart shows, for readers who do not see it."""
    unit = f" {chart.unit}" if chart.unit else ""
    ends = [
        f"{name} from {number(points[0][1])} at step {points[0][0]} to {number(points[-1][1])} at step {points[-1][0]}"
        for name, points in chart.curves
    ]
    best = f"; best {number(chart.best[1])} at step {chart.best[0]}" if chart.best else ""
    return f"{chart.title}{unit}, by step: {'; '.join(ends)}{best}"
