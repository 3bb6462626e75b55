"""HTML elements of the pages: tiles, tables, images. Every function escapes the text that it is given."""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from latentloom.report.diagnostics import Diagnostic
from latentloom.report.numbers import format_count
from latentloom.report.reading import PNGImage, is_number

OPTION = re.compile(r"--[a-z][\w.-]*\w")
LEVEL_LABELS = {"good": "Good", "note": "Note", "bad": "Problem"}  # not everyone can see the colours


class Tile(NamedTuple):
    """A metric in large print, with a line below."""

    label: str
    value: str
    unit: str
    below: str


def tiles(contents: Sequence[Tile]) -> str:
    if not contents:
        return ""
    cards = [
        f"<div><dt>{escape(tile.label)}</dt><dd><strong>{escape(tile.value)}</strong>"
        f"{f' <span>{escape(tile.unit)}</span>' if tile.unit else ''}<small>{escape(tile.below)}</small></dd></div>"
        for tile in contents
    ]
    return f'<dl class="tiles">{"".join(cards)}</dl>'


def diagnostic_list(diagnostics: Sequence[Diagnostic]) -> str:
    items = [
        f'<li class="{diagnostic.level}"><span class="level">{LEVEL_LABELS[diagnostic.level]}</span>'
        f"<div><strong>{escape(diagnostic.title)}</strong><p>{_mark_options(diagnostic.text)}</p></div></li>"
        for diagnostic in diagnostics
    ]
    return f'<ul class="diagnostics">{"".join(items)}</ul>' if items else ""


def _mark_options(text: str) -> str:
    """Escape `text` and set command-line options as code, which the style sheet keeps on one line."""
    return OPTION.sub(r"<code>\g<0></code>", escape(text))


Cell = str | tuple[str, str]
"""Text, or text with an explanation below it."""


def table(heads: Sequence[str], rows: Sequence[Sequence[Cell]], numeric: Sequence[int] = ()) -> str:
    """Return a table as HTML; the columns in `numeric` are right-aligned."""
    classes = [' class="n"' if i in numeric else "" for i in range(len(heads))]
    head = "".join(
        f'<th scope="col"{attribute}>{escape(text)}</th>' for attribute, text in zip(classes, heads, strict=True)
    )
    lines = [
        [f"<td{attribute}>{_render_cell(cell)}</td>" for attribute, cell in zip(classes, row, strict=True)]
        for row in rows
    ]
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _render_cell(cell: Cell) -> str:
    text, below = (cell, "") if isinstance(cell, str) else cell
    return escape(text) + (f"<small>{escape(below)}</small>" if below else "")


def machine_facts(environment: Mapping[str, Any]) -> str:
    """List machine, processes and versions of an `environment.json` or a `metrics.json`."""
    machine, versions = (
        value if isinstance(value, dict) else {} for value in (environment.get("machine"), environment.get("versions"))
    )
    facts = [(name, str(machine[name])) for name in ("device", "processor", "cores", "threads") if name in machine]
    if is_number(processes := environment.get("processes")):
        kind = environment.get("distributed_type")
        facts.append(("processes", f"{processes} ({kind})" if processes > 1 and kind else str(processes)))
    if versions:
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return fact_list(facts)


def fact_list(facts: Iterable[tuple[str, str]]) -> str:
    """Return names and values as a definition list; empty without facts."""
    entries = [f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts]
    return f'<dl class="facts">{"".join(entries)}</dl>' if entries else ""


def image_tag(image: PNGImage, alt: str, hidden: bool = False) -> str:
    """Return an `<img>` with the PNG data embedded."""
    data = base64.b64encode(image.png).decode("ascii")
    return (
        f'<img alt="{escape(alt)}" width="{image.width}" height="{image.height}"{" hidden" if hidden else ""} '
        f'src="data:image/png;base64,{data}">'
    )


def image_figure(image: PNGImage, caption: str) -> str:
    return f'<figure class="image">{image_tag(image, caption)}<figcaption>{escape(caption)}</figcaption></figure>'


def grid_player(grids: Sequence[tuple[int, PNGImage]], num_available: int, caption: str) -> str:
    """Show the last grid, with a slider over the steps and a play button.

    Slider and button are hidden until the page's script runs.

    Args:
        grids: Step and image of each grid.
        num_available: Number of grids in the run folder; the caption states it if it is larger than `len(grids)`.
        caption: What the grids show.
    """
    if not grids:
        return ""
    last = len(grids) - 1
    frames = [image_tag(image, f"{caption} at step {step:,}", hidden=i < last) for i, (step, image) in enumerate(grids)]
    steps = " ".join(str(step) for step, _ in grids)
    num_shown = len(grids)
    note = f" {format_count(num_shown, 'grid')} of {num_available}, evenly spaced." if num_available > num_shown else ""
    controls = (
        f'<div class="controls" hidden><button type="button">Play</button>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="Step of the displayed grid"></div>'
        if last
        else ""
    )
    return (
        f'<figure class="image player" data-steps="{steps}"><div class="frames">{"".join(frames)}</div>{controls}'
        f"<figcaption>{escape(caption)}, step <output>{grids[last][0]:,}</output>.{note}</figcaption></figure>"
    )
