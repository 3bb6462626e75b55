"""Pieces of the page: tiles, tables, pictures. Whatever comes from a file is escaped here, or by who hands over HTML."""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from latentloom.report.diagnostics import Diagnostic
from latentloom.report.numbers import count
from latentloom.report.reading import PNGImage, is_number

OPTION = re.compile(r"--[a-z][\w.-]*\w")
LEVELS = {"good": "Good", "note": "Note", "bad": "Problem"}  # in words too: colour alone does not reach everyone


class Tile(NamedTuple):
    label: str
    value: str
    unit: str
    below: str


def tiles(shown: Sequence[Tile]) -> str:
    if not shown:
        return ""
    cards = [
        f"<div><dt>{escape(tile.label)}</dt><dd><strong>{escape(tile.value)}</strong>"
        f"{f' <span>{escape(tile.unit)}</span>' if tile.unit else ''}<small>{escape(tile.below)}</small></dd></div>"
        for tile in shown
    ]
    return f'<dl class="tiles">{"".join(cards)}</dl>'


def diagnostic_list(found: Sequence[Diagnostic]) -> str:
    items = [
        f'<li class="{verdict.level}"><span class="level">{LEVELS[verdict.level]}</span><div><strong>{escape(verdict.title)}'
        f"</strong><p>{_marked(verdict.text)}</p></div></li>"
        for verdict in found
    ]
    return f'<ul class="verdicts">{"".join(items)}</ul>' if items else ""


def _marked(text: str) -> str:
    """Options of the command set off, so that no line breaks within one."""
    return OPTION.sub(r"<code>\g<0></code>", escape(text))


Cell = str | tuple[str, str]
"""Text, or text with an explanation below it."""


def table(heads: Sequence[str], rows: Sequence[Sequence[Cell]], numeric: Sequence[int] = ()) -> str:
    """Columns of `numeric` are set flush right."""
    kinds = [' class="n"' if i in numeric else "" for i in range(len(heads))]
    head = "".join(f'<th scope="col"{kind}>{escape(text)}</th>' for kind, text in zip(kinds, heads, strict=True))
    lines = [[f"<td{kind}>{_cell(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)] for row in rows]
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: Cell) -> str:
    text, below = (cell, "") if isinstance(cell, str) else cell
    return escape(text) + (f"<small>{escape(below)}</small>" if below else "")


def machine_facts(environment: Mapping[str, Any]) -> str:
    """Machine, processes and versions, as `environment.json` and `metrics.json` hold them."""
    machine, versions = environment.get("machine"), environment.get("versions")
    machine, versions = (found if isinstance(found, dict) else {} for found in (machine, versions))
    facts = [(name, str(machine[name])) for name in ("device", "processor", "cores", "threads") if name in machine]
    if is_number(processes := environment.get("processes")):
        kind = environment.get("distributed_type")
        facts.append(("processes", f"{processes} ({kind})" if processes > 1 and kind else str(processes)))
    if versions:
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return fact_list(facts)


def fact_list(facts: Iterable[tuple[str, str]]) -> str:
    """Names and values; nothing without any."""
    entries = [f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts]
    return f'<dl class="facts">{"".join(entries)}</dl>' if entries else ""


def image(picture: PNGImage, alt: str, hidden: bool = False) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    return (
        f'<img alt="{escape(alt)}" width="{picture.width}" height="{picture.height}"{" hidden" if hidden else ""} '
        f'src="data:image/png;base64,{data}">'
    )


def image_figure(picture: PNGImage, caption: str) -> str:
    return f'<figure class="picture">{image(picture, caption)}<figcaption>{escape(caption)}</figcaption></figure>'


def grid_player(grids: Sequence[tuple[int, PNGImage]], found: int, what: str) -> str:
    """Grids by step, the last one in view; the script takes the slider and the button out of hiding."""
    if not grids:
        return ""
    last = len(grids) - 1
    frames = [image(picture, f"{what} at step {step:,}", hidden=i < last) for i, (step, picture) in enumerate(grids)]
    steps = " ".join(str(step) for step, _ in grids)
    note = f" {count(len(grids), 'grid')} of {found}, evenly spread." if found > len(grids) else ""
    controls = (
        f'<div class="controls" hidden><button type="button">Play</button>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="Step of the grid shown"></div>'
        if last
        else ""
    )
    return (
        f'<figure class="picture player" data-steps="{steps}"><div class="frames">{"".join(frames)}</div>{controls}'
        f"<figcaption>{escape(what)}, step <output>{grids[last][0]:,}</output>.{note}</figcaption></figure>"
    )
