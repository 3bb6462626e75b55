"""How pages of inspected models are laid out: an overview, then sections that the head links to."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from latentloom import report
from latentloom.inspection.sections import Section
from latentloom.report.document import document

STYLES = (Path(report.__file__).parent / "page.css", Path(__file__).parent / "page.css")


def laid_out(*, name: str, kind: str, overview: str, sections: Sequence[Section]) -> str:
    anchors = "".join(f'<a href="#{part.place}">{escape(part.title)}</a>' for part in sections)
    body = "".join(
        f'<section id="{part.place}"><h2>{escape(part.title)}</h2>{part.html}</section>' for part in sections
    )
    return document(name=name, kind=kind, head=f"<nav>{anchors}</nav>", main=overview + body, styles=STYLES)
