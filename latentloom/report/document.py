"""Write an HTML document that loads nothing: its Content-Security-Policy forbids requests."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from latentloom import __version__

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def html_document(
    *, name: str, kind: str, head: str, main: str, styles: Sequence[Path], source: str = "", script: Path | None = None
) -> str:
    """Assemble an HTML document.

    Args:
        name: The title.
        kind: What the page is about, such as "training run of a tokenizer"; printed above the title.
        head: HTML below the title.
        main: HTML of the body.
        styles: CSS files, embedded in this order.
        source: Text appended to the footer, which names what the page was made from.
        script: JavaScript file to embed, if any.
    """
    title, style = escape(name), "".join(path.read_text(encoding="utf-8") for path in styles)
    policy = POLICY if script is None else f"{POLICY}; script-src 'unsafe-inline'"
    code = "" if script is None else f"<script>\n{script.read_text(encoding='utf-8')}</script>\n"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="color-scheme" content="light dark">
<title>{title} · latentloom</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header><p class="kind">latentloom · {kind}</p><h1>{title}</h1>{head}</header>
<main>{main}</main>
<footer>Written by latentloom {escape(__version__)}{source}.</footer>
{code}</body>
</html>
"""
