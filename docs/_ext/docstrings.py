"""Converts the project's docstrings to reStructuredText for Napoleon and Sphinx.

The docstrings are plain text in Google style, with three additions to reStructuredText:

    `name`                         code, in single backticks
    an indented block              mathematics or a table, shown unchanged
    Args:  x: what it is           a section that begins on the line of its title

All other text is escaped, so that `*args`, `name_` and |x| in running text stay as they are.
"""

import re
from collections.abc import Iterator

from sphinx.application import Sphinx

SECTIONS = ("Args", "Arguments", "Returns", "Yields", "Raises", "Source", "Example", "Examples", "Note", "Notes")
TITLE = re.compile(rf"({'|'.join(SECTIONS)}):(?:\s+(\S.*))?$")
ARGUMENT = re.compile(r"\*{0,2}\w+(, \w+)*( \(.*?\))?:")
ERROR = re.compile(r"([A-Z]\w+)(?:[:,]|\b(?= \w))\s*(.+)$")
ITEM = re.compile(r"[-*] ")
CODE = re.compile(r"(``[^`]+``|`[^`]+`)")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", convert_docstring, priority=400)  # before Napoleon
    return {"parallel_read_safe": True}


def convert_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    if len(lines) and re.match(r"Alias for field number \d+$", lines[0]):
        lines[:] = []  # Python's own text for a field of a NamedTuple
        return
    lines[:] = [*convert_lines(lines)]
    if what in ("attribute", "data", "property"):
        lines.insert(0, "")  # otherwise Napoleon takes the text before the first colon for a type


def convert_lines(lines: list[str]) -> Iterator[str]:
    """Convert the lines of a docstring, without common indentation, to reStructuredText with Google's sections."""
    position, in_list = 0, False
    while position < len(lines):
        line = lines[position]
        if title := TITLE.match(line):
            end = _find_block_end(lines, position + 1, " ")
            body = ([title[2]] if title[2] else []) + lines[position + 1 : end]
            yield from ("", *_convert_section(title[1], [text for text in body if text.strip()]), "")
            position, in_list = end, False
        elif line.startswith("    ") and (position == 0 or not lines[position - 1].strip()):
            end = _find_block_end(lines, position, "    ")
            yield from ("", "::", "", *(text.rstrip() for text in lines[position:end]), "")
            position, in_list = end, False
        else:
            in_list = bool(ITEM.match(line)) or (in_list and (line.startswith(" ") or not line.strip()))
            yield escape(line if in_list else line.strip())
            position += 1


def _find_block_end(lines: list[str], position: int, indent: str) -> int:
    """Find the first line after an indented block. The block may contain empty lines."""
    end = position
    for number in range(position, len(lines)):
        if lines[number].startswith(indent):
            end = number + 1
        elif lines[number].strip():
            break
    return end


def _convert_section(title: str, body: list[str]) -> Iterator[str]:
    """Convert a section: named entries for Napoleon, plain text as a field."""
    if title in ("Args", "Arguments") and body and ARGUMENT.match(body[0].strip()):
        yield f"{title}:"
        yield from _indent_entries(body, ARGUMENT)
    elif title == "Raises" and body and ERROR.match(body[0].strip()):
        yield f"{title}:"
        yield from _indent_entries(
            [ERROR.sub(r"\1: \2", line.strip()) if ERROR.match(line.strip()) else line for line in body], ARGUMENT
        )
    else:
        name = "Arguments" if title == "Args" else title
        yield f":{name}: {escape(' '.join(line.strip() for line in body))}"


def _indent_entries(body: list[str], entry: re.Pattern[str]) -> Iterator[str]:
    """Indent an entry by four spaces and its further lines by eight."""
    smallest_indent = min(len(line) - len(line.lstrip()) for line in body[1:] or body)
    for number, line in enumerate(body):
        is_deeper = number > 0 and len(line) - len(line.lstrip()) > smallest_indent
        is_entry = entry.match(line.strip()) and not is_deeper
        yield ("    " if is_entry else "        ") + escape(line.strip())


def escape(line: str) -> str:
    """Put code in double backticks and escape all other text."""
    parts = CODE.split(line)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"``{part.strip('`')}``"
            if i + 1 < len(parts) and re.match(r"\w", parts[i + 1]):
                parts[i + 1] = "\\ " + parts[i + 1]  # an inline literal must end at the end of a word: `x`s
        else:
            bullet = re.match(r"\s*[-*] ", part) if i == 0 else None
            start = bullet.end() if bullet else 0
            text = part[start:].replace("\\", "\\\\").replace("*", "\\*").replace("|", "\\|").replace("`", "\\`")
            parts[i] = part[:start] + re.sub(r"(?<=\w)_(?!\w)", r"\\_", text)
    return "".join(parts)
