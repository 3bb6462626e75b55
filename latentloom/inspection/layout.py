"""The layout of inspection pages: an overview, then sections with links from the top of the page."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from latentloom import report
from latentloom.inspection.sections import Section
from latentloom.report.document import html_document

STYLES = (Path(report.__file__).parent / "page.css", Path(__file__).parent / "page.css")


def inspection_page(*, name: str, kind: str, overview: str, sections: Sequence[Section]) -> str:
    """Assemble an HTML page from its parts."""
    links = "".join(f'<a href="#{section.anchor}">{escape(section.title)}</a>' for section in sections)
    body = "".join(
        f'<section id="{section.anchor}"><h2>{escape(section.title)}</h2>{section.html}</section>'
        for section in sections
    )
    return html_document(name=name, kind=kind, head=f"<nav>{links}</nav>", main=overview + body, styles=STYLES)
