"""The options of every verb, read from `latentloom VERB --help`.

The reference pages and the tests both use this module, so that a page can only name options that exist.
"""

import contextlib
import io
import os
import re
from dataclasses import dataclass
from unittest import mock

from latentloom.cli import VERBS, main

WIDTH = "100"  # one column of boxes, whatever the terminal is
RULE = set("─╭╮╰╯│| +-")


@dataclass(frozen=True)
class Option:
    names: tuple[str, ...]
    """`--overwrite` and `--no-overwrite`, or one name; the metavar of a positional argument."""
    values: str
    """What follows the name, such as `INT` or `{pad,refuse}`; empty for a flag."""
    help: str
    default: str | None
    """None when the option is required."""


@dataclass(frozen=True)
class Group:
    title: str
    """`options`, or the section of the configuration, such as `model.quantizer options`."""
    options: tuple[Option, ...]

    @property
    def section(self) -> str:
        """`model.quantizer`; empty for the options that belong to no section."""
        return self.title.removesuffix("options").strip()


def help_text(verb: str, *words: str) -> str:
    """What `latentloom VERB --help` prints, 100 columns wide and without colours."""
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # tyro draws the boxes that its output can encode
    with (
        mock.patch.dict(os.environ, {"COLUMNS": WIDTH, "NO_COLOR": "1", "TERM": "dumb"}),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main([verb, *words, "--help"])
    printed.seek(0)
    return printed.read()


def groups(verb: str, *words: str) -> list[Group]:
    """The options of a verb, by the boxes that `--help` draws; `words` such as `--recipe NAME` choose the configuration."""
    found: list[Group] = []
    title, lines = "", list[str]()
    for line in help_text(verb, *words).splitlines():
        if line.startswith("╭"):
            title, lines = line.strip("╭╮─ "), []
        elif line.startswith("╰"):
            found.append(Group(title, tuple(_options(lines))))
        elif line.startswith("│"):
            lines.append(line[2:-1].rstrip())
    return [group for group in found if group.options]


def option_names(verb: str, *words: str) -> set[str]:
    """Every word that begins with `--` and that the verb takes."""
    return {name for group in groups(verb, *words) for option in group.options for name in option.names}


def _options(lines: list[str]) -> list[Option]:
    """The options in one box: names at the left, descriptions below them or, in a box of short names, beside them."""
    rules = [i for i, line in enumerate(lines) if line and set(line) <= RULE]
    lines = lines[rules[0] + 1 :] if rules else lines  # what stands above a rule describes the whole box
    indents = [len(line) - len(line.lstrip()) for line in lines if line.startswith(" ")]
    column = min(indents, default=0) or _column(lines)
    entries: list[tuple[str, list[str]]] = []
    for line in filter(None, lines):
        if line.startswith(" "):
            entries[-1][1].append(line.strip())
        elif line[column - 2 : column] == "  ":
            entries.append((line[:column].strip(), [line[column:].strip()]))
        elif entries and not line.startswith("-"):
            entries[-1] = (f"{entries[-1][0]} {line}", [])  # a long list of values goes on in the next line
        else:
            entries.append((line, []))
    return [_option(head, " ".join(text)) for head, text in entries]


def _column(lines: list[str]) -> int:
    """Where descriptions begin in a box in which each takes one line."""
    gap = re.search(r"\S {2,}(?=\S)", next(iter(lines), ""))
    return gap.end() if gap else 0


def _option(head: str, text: str) -> Option:
    names = re.findall(r"(?<![\w-])--?[\w.-]+", head) or [head]
    values = "" if len(names) > 1 or head == names[0] else head.removeprefix(names[0]).strip()
    default = re.search(r"\s*\(default: ?(.*)\)$|\s*\(required\)$", text)
    if default is None:
        return Option(tuple(names), values, text, "")
    return Option(tuple(names), values, text[: default.start()], default[1])


def verbs() -> list[str]:
    return list(VERBS)
