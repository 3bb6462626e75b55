"""Line charts as inline SVG: a few kilobytes each, sharp at any size, in the page's colours.

The page's style sheet sets the colours of the classes. Its script reads `data-steps` and `data-values` to show the values under
the pointer. A chart is 400 units wide and about as many pixels on the page, so its labels are as large as the text around it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from latentloom.report.numbers import format_number, log_ticks, round_ticks

Points = list[tuple[int, float]]
"""Steps in rising order, each with a finite value."""

WIDTH, HEIGHT = 400, 228
LEFT, RIGHT, TOP, BOTTOM = 50, 388, 18, 204
MAX_CURVE_POINTS, MAX_MARKS = 1000, 200
MAX_DOTTED_POINTS = 24  # curves with more points have no dot at each point
NUM_COLOURS = 7  # in the style sheet


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over training steps, with reference lines, marks and a note."""

    title: str
    curves: list[tuple[str, Points]]
    """Name and points of each curve; no curve is empty."""
    unit: str = ""
    log: bool = False
    """Use a logarithmic axis if all values are positive."""
    from_zero: bool = False
    levels: list[tuple[str, float]] = field(default_factory=list)
    """Named horizontal lines to compare the curves with."""
    best: tuple[int, float] | None = None
    """Step and value of the best point."""
    marks: Points = field(default_factory=list)
    mark_name: str = "spike"
    resumed_steps: list[int] = field(default_factory=list)
    """Steps from which the run was resumed."""
    note: str = ""
    """A sentence below the chart."""


def thin_points(points: Points, limit: int = MAX_CURVE_POINTS) -> Points:
    """Reduce a curve to at most `limit` points.

    The first and the last point stay. The points between are divided into equal intervals; the lowest and the highest point of
    each interval stay.
    """
    if len(points) <= limit:
        return points
    inner, num_intervals = points[1:-1], max(1, (limit - 2) // 2)
    thinned = [points[0]]
    for i in range(num_intervals):
        interval = inner[i * len(inner) // num_intervals : (i + 1) * len(inner) // num_intervals]
        extremes = {
            min(range(len(interval)), key=lambda j: interval[j][1]),
            max(range(len(interval)), key=lambda j: interval[j][1]),
        }
        thinned += [interval[j] for j in sorted(extremes)]
    return [*thinned, points[-1]]


def render_chart(chart: Chart) -> str:
    """Return the chart as a `<figure>` with its title, legend and note."""
    values = [value for _, points in chart.curves for _, value in points] + [value for _, value in chart.marks]
    values += [level for _, level in chart.levels]
    log = chart.log and min(values) > 0
    low, high = _axis_limits(values, log, chart.from_zero)
    last_step = max(
        [step for points in (*(points for _, points in chart.curves), chart.marks) for step, _ in points] + [1]
    )

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / last_step

    def y(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return BOTTOM - (BOTTOM - TOP) * share

    ticks = log_ticks(low, high, 5) if log else round_ticks(low, high, 5)
    parts = [_render_axes(ticks, round_ticks(0, last_step, 5), x, y)]
    parts += [_render_resumption(x(step)) for step in chart.resumed_steps if step <= last_step]
    parts += [f'<path class="level" d="M{LEFT} {y(value):.1f}H{RIGHT}"/>' for _, value in chart.levels]
    parts += [_render_curve(i, name, points, x, y) for i, (name, points) in enumerate(chart.curves)]
    parts += [_render_mark(step, value, x(step), y(value)) for step, value in thin_points(chart.marks, MAX_MARKS)]
    if chart.best is not None:
        parts.append(_render_best(x(chart.best[0]), y(chart.best[1])))
    unit = f' <span class="unit">{escape(chart.unit)}</span>' if chart.unit else ""
    scale = ' <span class="unit">log scale</span>' if log else ""
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    return (
        f'<figure class="chart"><figcaption><h4>{escape(chart.title)}{unit}{scale}</h4>{_render_legend(chart)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_describe(chart))}" '
        f'data-unit="{escape(chart.unit)}">{"".join(parts)}'
        f'<line class="pointer" y1="{TOP}" y2="{BOTTOM}" x1="0" x2="0"/></svg>{note}</figure>'
    )


def _axis_limits(values: Sequence[float], log: bool, from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        margin = max((high / low) ** 0.05, 1.02)
        return low / margin, high * margin
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return (min(0.0, low) if from_zero else low - margin), high + margin


def _render_axes(
    ticks: list[float], steps: list[float], x: Callable[[float], float], y: Callable[[float], float]
) -> str:
    grid_lines = "".join(f'<path d="M{LEFT} {y(tick):.1f}H{RIGHT}"/>' for tick in ticks)
    y_labels = "".join(f'<text x="{LEFT - 7}" y="{y(tick) + 4:.1f}">{format_number(tick)}</text>' for tick in ticks)
    x_labels = "".join(f'<text x="{x(step):.1f}" y="{BOTTOM + 18}">{_shorten_step(step)}</text>' for step in steps)
    return (
        f'<g class="grid">{grid_lines}</g><path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>'
        f'<g class="ticks y">{y_labels}</g><g class="ticks x">{x_labels}</g>'
        f'<g class="ticks y"><text x="{LEFT - 16}" y="{BOTTOM + 18}">step</text></g>'
    )


def _shorten_step(step: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if step >= 10 * size or (step >= size and letter == "M"):
            return format_number(step / size) + letter
    return format_number(step)


def _render_curve(i: int, name: str, points: Points, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    thinned = thin_points(points)
    coordinates = [f"{x(step):.1f},{y(value):.1f}" for step, value in thinned]
    dots = "".join('<circle cx="{}" cy="{}" r="2.2"/>'.format(*pair.split(",")) for pair in coordinates)
    steps, values = " ".join(str(step) for step, _ in thinned), " ".join(f"{value:.6g}" for _, value in thinned)
    return (
        f'<g class="curve c{i % NUM_COLOURS}" data-name="{escape(name)}" data-steps="{steps}" data-values="{values}">'
        f'<polyline points="{" ".join(coordinates)}"/>{dots if len(thinned) <= MAX_DOTTED_POINTS else ""}</g>'
    )


def _render_resumption(x: float) -> str:
    return f'<g class="resumed"><title>resumed</title><path d="M{x:.1f} {TOP}V{BOTTOM}"/></g>'


def _render_mark(step: int, value: float, x: float, y: float) -> str:
    title = f"step {step:,}: {format_number(value)}"
    return f'<path class="mark" d="M{x:.1f} {y - 5:.1f}l4.5 8h-9z"><title>{title}</title></path>'


def _render_best(x: float, y: float) -> str:
    label_x, anchor = (x + 9, "start") if x < RIGHT - 60 else (x - 9, "end")
    return (
        f'<g class="best"><circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
        f'<text x="{label_x:.1f}" y="{y - 8:.1f}" text-anchor="{anchor}">best</text></g>'
    )


def _render_legend(chart: Chart) -> str:
    entries = [f'<li class="c{i % NUM_COLOURS}">{escape(name)}</li>' for i, (name, _) in enumerate(chart.curves)]
    entries += [f'<li class="level">{escape(name)}</li>' for name, _ in chart.levels]
    if chart.marks:
        entries.append(f'<li class="mark">{escape(chart.mark_name)}</li>')
    if chart.resumed_steps:
        entries.append('<li class="resumed">resumed</li>')
    return f'<ul class="legend">{"".join(entries)}</ul>' if len(entries) > 1 else ""


def _describe(chart: Chart) -> str:
    """Describe the chart in words, for screen readers."""
    unit = f" {chart.unit}" if chart.unit else ""
    curves = [
        f"{name} from {format_number(points[0][1])} at step {points[0][0]} "
        f"to {format_number(points[-1][1])} at step {points[-1][0]}"
        for name, points in chart.curves
    ]
    best = f"; best {format_number(chart.best[1])} at step {chart.best[0]}" if chart.best else ""
    return f"{chart.title}{unit}, by step: {'; '.join(curves)}{best}"
