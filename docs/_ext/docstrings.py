"""Turns the project's docstrings into reStructuredText that Napoleon and Sphinx understand.

The docstrings are plain text in Google style, with three habits that reStructuredText does not know:

    `name`                         code, in single backticks
    an indented block              mathematics or a table, to be shown as it stands
    Args:  x: what it is           a section that begins on the line of its title

Everything else is escaped, so that `*args`, `name_` and |x| in running text mean themselves.
"""

import re
from collections.abc import Iterator

from sphinx.application import Sphinx

SECTIONS = ("Args", "Arguments", "Returns", "Yields", "Raises", "Source", "Example", "Examples", "Note", "Notes")
TITLE = re.compile(rf"({'|'.join(SECTIONS)}):(?:\s+(\S.*))?$")
ENTRY = re.compile(r"\*{0,2}\w+(, \w+)*( \(.*?\))?:")
ERROR = re.compile(r"([A-Z]\w+)(?:[:,]|\b(?= \w))\s*(.+)$")
ITEM = re.compile(r"[-*] ")
CODE = re.compile(r"(``[^`]+``|`[^`]+`)")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process, priority=400)  # before Napoleon's own
    return {"parallel_read_safe": True}


def process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    if len(lines) and re.match(r"Alias for field number \d+$", lines[0]):
        lines[:] = []  # what Python says of a NamedTuple's field
        return
    lines[:] = [*converted(lines)]
    if what in ("attribute", "data", "property"):
        lines.insert(0, "")  # or Napoleon would take what stands before the first colon for a type


def converted(lines: list[str]) -> Iterator[str]:
    """The lines of a docstring, its common indentation removed, as reStructuredText with Google's sections."""
    position, in_list = 0, False
    while position < len(lines):
        line = lines[position]
        if title := TITLE.match(line):
            end = _end_of(lines, position + 1, " ")
            body = ([title[2]] if title[2] else []) + lines[position + 1 : end]
            yield from ("", *_section(title[1], [text for text in body if text.strip()]), "")
            position, in_list = end, False
        elif line.startswith("    ") and (position == 0 or not lines[position - 1].strip()):
            end = _end_of(lines, position, "    ")
            yield from ("", "::", "", *(text.rstrip() for text in lines[position:end]), "")
            position, in_list = end, False
        else:
            in_list = bool(ITEM.match(line)) or (in_list and (line.startswith(" ") or not line.strip()))
            yield escaped(line if in_list else line.strip())
            position += 1


def _end_of(lines: list[str], position: int, indent: str) -> int:
    """The first line after an indented block, which may have empty lines within it."""
    end = position
    for number in range(position, len(lines)):
        if lines[number].startswith(indent):
            end = number + 1
        elif lines[number].strip():
            break
    return end


def _section(title: str, body: list[str]) -> Iterator[str]:
    """A section: entries with names for Napoleon, and plain words as a field of their own."""
    if title in ("Args", "Arguments") and body and ENTRY.match(body[0].strip()):
        yield f"{title}:"
        yield from _entries(body, ENTRY)
    elif title == "Raises" and body and ERROR.match(body[0].strip()):
        yield f"{title}:"
        yield from _entries(
            [ERROR.sub(r"\1: \2", line.strip()) if ERROR.match(line.strip()) else line for line in body], ENTRY
        )
    else:
        name = "Arguments" if title == "Args" else title
        yield f":{name}: {escaped(' '.join(line.strip() for line in body))}"


def _entries(body: list[str], entry: re.Pattern[str]) -> Iterator[str]:
    """Four spaces before an entry, eight before the lines that continue it."""
    least = min(len(line) - len(line.lstrip()) for line in body[1:] or body)
    for number, line in enumerate(body):
        deeper = number > 0 and len(line) - len(line.lstrip()) > least
        starts = entry.match(line.strip()) and not deeper
        yield ("    " if starts else "        ") + escaped(line.strip())


def escaped(line: str) -> str:
    """Code in double backticks, and everything else as it stands."""
    parts = CODE.split(line)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"``{part.strip('`')}``"
            if i + 1 < len(parts) and re.match(r"\w", parts[i + 1]):
                parts[i + 1] = "\\ " + parts[i + 1]  # an inline literal must end at a word's end: `x`s
        else:
            bullet = re.match(r"\s*[-*] ", part) if i == 0 else None
            start = bullet.end() if bullet else 0
            text = part[start:].replace("\\", "\\\\").replace("*", "\\*").replace("|", "\\|").replace("`", "\\`")
            parts[i] = part[:start] + re.sub(r"(?<=\w)_(?!\w)", r"\\_", text)
    return "".join(parts)
