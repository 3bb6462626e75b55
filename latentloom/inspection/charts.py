"""Charts of the pages as inline SVG, with the report's CSS classes: heat maps over positions, code usage, histograms."""

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import product

import numpy as np
import torch
from torch import Tensor

from latentloom.inspection.colours import colour_legend, map_to_colours
from latentloom.report.numbers import format_number, format_percent, log_ticks, round_ticks
from latentloom.report.svg_charts import LEFT, NUM_COLOURS, RIGHT, TOP, WIDTH

CELL_SIZE = 10  # SVG units
MAX_LABELLED_COLUMNS = 12  # maps with more columns have no values in their cells
HEIGHT, BOTTOM = 385, 361  # about the height of the heat maps in the same row
MAX_CURVE_POINTS = 300
BAR_WIDTH, BAR_HEIGHT = 5, 60  # SVG units


def heat_map(title: str, unit: str, values: Tensor, limits: tuple[float, float], digits: int = 3) -> str:
    """Return a map of `values` as an HTML figure, with one cell for each position.

    Args:
        title: Title of the figure.
        unit: Unit of the values.
        values: (h, w).
        limits: Values at the dark and the light end of the colour scale.
        digits: Significant digits of the printed values.
    """
    low, high = limits
    low_label, high_label = format_number(low, digits), format_number(high, digits)
    colours = map_to_colours((values - low) / (high - low) if high > low else torch.zeros_like(values))
    rows, columns = values.shape
    cells = [
        render_cell(
            i, j, format_number(float(values[i, j]), digits), colours[i, j].tolist(), columns <= MAX_LABELLED_COLUMNS
        )
        for i, j in product(range(rows), range(columns))
    ]
    label = f"{title}, {unit}, {rows} × {columns} positions, from {low_label} to {high_label}"
    return (
        f'<figure class="chart"><figcaption><h4>{escape(title)} <span class="unit">{escape(unit)}</span></h4>'
        f"{colour_legend(low_label, high_label)}</figcaption>"
        f'<svg class="heat" viewBox="0 0 {CELL_SIZE * columns} {CELL_SIZE * rows}" role="img" aria-label="{escape(label)}">'
        f"{''.join(cells)}</svg></figure>"
    )


def render_cell(row: int, column: int, value: str, colour: Sequence[int], is_labelled: bool) -> str:
    red, green, blue = colour
    square = (
        f'<rect x="{CELL_SIZE * column}" y="{CELL_SIZE * row}" width="{CELL_SIZE}" height="{CELL_SIZE}" '
        f'fill="#{red:02x}{green:02x}{blue:02x}"><title>row {row + 1}, column {column + 1}: {value}</title></rect>'
    )
    if not is_labelled:
        return square
    is_light = 0.3 * red + 0.59 * green + 0.11 * blue > 140  # luma; light cells get dark text
    text_class = "dark" if is_light else "pale"
    return f'{square}<text class="{text_class}" x="{CELL_SIZE * (column + 0.5):g}" y="{CELL_SIZE * (row + 0.5):g}">{value}</text>'


def code_usage_chart(levels: Sequence[tuple[str, Tensor]], note: str) -> str:
    """Plot the share of each code by rank on a log scale, with a line at uniform usage, 1 / K.

    Args:
        levels: Name and (K,) counts of each level.
        note: A sentence below the chart.
    """
    size = len(levels[0][1])
    curves = [(name, (counts.sort(descending=True).values / counts.sum()).tolist()) for name, counts in levels]
    nonzero_shares = [share for _, shares in curves for share in shares if share] + [1 / size]
    low, high = min(nonzero_shares) / 1.3, max(nonzero_shares) * 1.3

    def x(rank: float) -> float:
        return LEFT + (RIGHT - LEFT) * (rank - 0.5) / size

    def y(share: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * math.log(share / low) / math.log(high / low)

    parts = [render_usage_axes(low, high, size, x, y), f'<path class="level" d="M{LEFT} {y(1 / size):.1f}H{RIGHT}"/>']
    parts += [render_usage_curve(i, shares, x, y) for i, (_, shares) in enumerate(curves)]
    names = "".join(f'<li class="c{i % NUM_COLOURS}">{escape(name)}</li>' for i, (name, _) in enumerate(curves))
    label = (
        f"Code usage by rank, log scale: the most used code has {format_percent(max(nonzero_shares))} of all tokens, a uniform "
        f"share is {format_percent(1 / size)}"
    )
    return (
        f'<figure class="chart"><figcaption><h4>Code usage by rank <span class="unit">share of all tokens</span> '
        f'<span class="unit">log scale</span></h4>'
        f'<ul class="legend">{names}<li class="level">uniform usage, 1 / K</li></ul></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
        f'<p class="note">{escape(note)}</p></figure>'
    )


def render_usage_curve(i: int, shares: list[float], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """Return the curve of falling shares; it ends with a dot at the last used code if some codes are unused."""
    num_used = sum(share > 0 for share in shares)
    ranks = sorted({round(rank) for rank in np.linspace(1, num_used, min(num_used, MAX_CURVE_POINTS))})
    coordinates = [f"{x(rank):.1f},{y(shares[rank - 1]):.1f}" for rank in ranks]
    dot = '<circle cx="{}" cy="{}" r="2.2"/>'.format(*coordinates[-1].split(","))
    polyline = f'<polyline points="{" ".join(coordinates)}"/>'
    return f'<g class="curve c{i % NUM_COLOURS}">{polyline}{dot if num_used < len(shares) else ""}</g>'


def render_usage_axes(
    low: float, high: float, size: int, x: Callable[[float], float], y: Callable[[float], float]
) -> str:
    ticks = log_ticks(low, high, 5)
    grid_lines = "".join(f'<path d="M{LEFT} {y(tick):.1f}H{RIGHT}"/>' for tick in ticks)
    y_labels = "".join(
        f'<text x="{LEFT - 7}" y="{y(tick) + 4:.1f}">{format_number(100 * tick, 2)} %</text>' for tick in ticks
    )
    ranks = [1, *(rank for rank in round_ticks(0, size, 5) if rank)]
    x_labels = "".join(f'<text x="{x(rank):.1f}" y="{BOTTOM + 18}">{format_number(rank, 9)}</text>' for rank in ranks)
    return (
        f'<g class="grid">{grid_lines}</g><path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>'
        f'<g class="ticks y">{y_labels}</g><g class="ticks x">{x_labels}</g>'
        f'<g class="ticks y"><text x="{LEFT - 16}" y="{BOTTOM + 18}">rank</text></g>'
    )


def histogram(counts: Sequence[int], label: str) -> str:
    """Return a bar chart without axes; the largest count has the full height."""
    largest = max(counts) or 1
    heights = [BAR_HEIGHT * count / largest for count in counts]
    bars = [
        f'<rect x="{BAR_WIDTH * i}" y="{BAR_HEIGHT - height:.1f}" width="{BAR_WIDTH - 1}" height="{height:.1f}"/>'
        for i, height in enumerate(heights)
    ]
    view_box = f"0 0 {BAR_WIDTH * len(counts)} {BAR_HEIGHT}"
    return f'<svg class="bars" viewBox="{view_box}" role="img" aria-label="{escape(label)}">{"".join(bars)}</svg>'
