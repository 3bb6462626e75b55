"""Drawings of the page as inline SVG, in the report's classes: maps over the grid of codes, codes by use, histograms."""

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import product

import numpy as np
import torch
from torch import Tensor

from latentloom.inspection.colours import coloured, legend
from latentloom.report.numbers import log_ticks, number, percent, round_ticks
from latentloom.report.svg_charts import COLOURS, LEFT, RIGHT, TOP, WIDTH

CELL, MOST_LABELLED = 10, 12  # units of a cell; columns up to which its value is written into it
HEIGHT, BOTTOM = 385, 361  # about as high as the maps beside it
RANKS = 300  # places at which a curve of codes by use is drawn, at most
BAR, BAR_HEIGHT = 5, 60  # units of a histogram's bars


def heat_map(title: str, unit: str, values: Tensor, ends: tuple[float, float], digits: int = 3) -> str:
    """(h, w) values as a figure, a cell for each position; `ends` are those of the colour scale."""
    low, high = ends
    least, most = number(low, digits), number(high, digits)
    colours = coloured((values - low) / (high - low) if high > low else torch.zeros_like(values))
    rows, columns = values.shape
    cells = [
        cell(i, j, number(float(values[i, j]), digits), colours[i, j].tolist(), columns <= MOST_LABELLED)
        for i, j in product(range(rows), range(columns))
    ]
    label = f"{title}, {unit}, {rows} × {columns} positions, from {least} to {most}"
    return (
        f'<figure class="chart"><figcaption><h4>{escape(title)} <span class="unit">{escape(unit)}</span></h4>'
        f"{legend(least, most)}</figcaption>"
        f'<svg class="heat" viewBox="0 0 {CELL * columns} {CELL * rows}" role="img" aria-label="{escape(label)}">'
        f"{''.join(cells)}</svg></figure>"
    )


def cell(row: int, column: int, said: str, colour: Sequence[int], labelled: bool) -> str:
    red, green, blue = colour
    square = (
        f'<rect x="{CELL * column}" y="{CELL * row}" width="{CELL}" height="{CELL}" fill="#{red:02x}{green:02x}{blue:02x}">'
        f"<title>row {row + 1}, column {column + 1}: {said}</title></rect>"
    )
    if not labelled:
        return square
    light = 0.3 * red + 0.59 * green + 0.11 * blue > 140  # as the eye weighs them; what stands on it is dark then
    kind = "dark" if light else "pale"
    return f'{square}<text class="{kind}" x="{CELL * (column + 0.5):g}" y="{CELL * (row + 0.5):g}">{said}</text>'


def codes_by_use(levels: Sequence[tuple[str, Tensor]], note: str) -> str:
    """Shares of all choices by rank, on a log scale, with the line on which all codes would be chosen alike.

    `levels` are (K,) counts, by name.
    """
    size = len(levels[0][1])
    shares = [(name, (counts.sort(descending=True).values / counts.sum()).tolist()) for name, counts in levels]
    shown = [share for _, of_level in shares for share in of_level if share] + [1 / size]
    low, high = min(shown) / 1.3, max(shown) * 1.3

    def x(rank: float) -> float:
        return LEFT + (RIGHT - LEFT) * (rank - 0.5) / size

    def y(share: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * math.log(share / low) / math.log(high / low)

    parts = [axes(low, high, size, x, y), f'<path class="level" d="M{LEFT} {y(1 / size):.1f}H{RIGHT}"/>']
    parts += [curve(i, share, x, y) for i, (_, share) in enumerate(shares)]
    names = "".join(f'<li class="c{i % COLOURS}">{escape(name)}</li>' for i, (name, _) in enumerate(shares))
    label = f"Codes by use, log scale: the most used has {percent(max(shown))} of all choices, a uniform one {percent(1 / size)}"
    return (
        f'<figure class="chart"><figcaption><h4>Codes by use <span class="unit">share of all choices</span> '
        f'<span class="unit">log scale</span></h4>'
        f'<ul class="legend">{names}<li class="level">all alike, 1 / K</li></ul></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
        f'<p class="note">{escape(note)}</p></figure>'
    )


def curve(i: int, shares: list[float], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """From the most used code to the last that is used; falling shares."""
    last = sum(share > 0 for share in shares)
    ranks = sorted({round(rank) for rank in np.linspace(1, last, min(last, RANKS))})
    places = [f"{x(rank):.1f},{y(shares[rank - 1]):.1f}" for rank in ranks]
    dot = '<circle cx="{}" cy="{}" r="2.2"/>'.format(*places[-1].split(","))
    return f'<g class="curve c{i % COLOURS}"><polyline points="{" ".join(places)}"/>{dot if last < len(shares) else ""}</g>'


def axes(low: float, high: float, size: int, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    ticks = log_ticks(low, high, 5)
    lines = "".join(f'<path d="M{LEFT} {y(tick):.1f}H{RIGHT}"/>' for tick in ticks)
    values = "".join(f'<text x="{LEFT - 7}" y="{y(tick) + 4:.1f}">{number(100 * tick, 2)} %</text>' for tick in ticks)
    ranks = [1, *(rank for rank in round_ticks(0, size, 5) if rank)]
    along = "".join(f'<text x="{x(rank):.1f}" y="{BOTTOM + 18}">{number(rank, 9)}</text>' for rank in ranks)
    return (
        f'<g class="grid">{lines}</g><path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>'
        f'<g class="ticks y">{values}</g><g class="ticks x">{along}</g>'
        f'<g class="ticks y"><text x="{LEFT - 16}" y="{BOTTOM + 18}">rank</text></g>'
    )


def histogram(counts: Sequence[int], label: str) -> str:
    """Bars as high as the largest count, without axes."""
    most = max(counts) or 1
    heights = [BAR_HEIGHT * count / most for count in counts]
    bars = [
        f'<rect x="{BAR * i}" y="{BAR_HEIGHT - height:.1f}" width="{BAR - 1}" height="{height:.1f}"/>'
        for i, height in enumerate(heights)
    ]
    box = f"0 0 {BAR * len(counts)} {BAR_HEIGHT}"
    return f'<svg class="bars" viewBox="{box}" role="img" aria-label="{escape(label)}">{"".join(bars)}</svg>'
