"""Command-line arguments from typed dataclasses, with every mistake as one line."""

import contextlib
import difflib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from latentloom.recipes import recipe_values
from training_harness.configuration import from_mapping, merged, read_yaml
from training_harness.errors import ConfigError, UserError

Arguments = TypeVar("Arguments")


def parse(cls: type[Arguments], verb: str, arguments: Sequence[str], default: Arguments | None = None) -> Arguments:
    """An instance of the dataclass `cls` from command-line words; raises UserError for words that do not fit."""
    said, prog = io.StringIO(), f"latentloom {verb}"
    start = tyro.MISSING_NONPROP if default is None else default
    if {"-h", "--help"} & set(arguments):
        tyro.cli(cls, args=["--help"], prog=prog, default=start)
    try:
        with contextlib.redirect_stderr(said):
            parsed, unknown = tyro.cli(cls, args=list(arguments), prog=prog, default=start, return_unknown_args=True)
    except SystemExit:
        raise UserError(f"{_first_paragraph(said.getvalue())}; see latentloom {verb} --help") from None
    if unknown:
        options = _options(cls, default)
        name = unknown[0].split("=")[0]
        close = difflib.get_close_matches(name, options, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"see latentloom {verb} --help"
        kind = "option" if name.startswith("-") else "argument"
        raise UserError(f"unknown {kind} '{name}'; {hint}")
    return parsed


def _options(cls: type, default: object) -> list[str]:
    parser = tyro.extras.get_parser(cls, default=tyro.MISSING_NONPROP if default is None else default)
    return [option for action in parser._actions for option in action.option_strings]


def _first_paragraph(box: str) -> str:
    """The text of tyro's framed message up to its first rule, as one line."""
    lines = [line.strip().strip("│").strip() for line in box.splitlines()]
    paragraph: list[str] = []
    for line in lines:
        if line.startswith("╭"):
            continue
        if line.startswith(("──", "╰")):
            break
        paragraph.append(line)
    return " ".join(" ".join(paragraph).split())


def training_values(
    stage: str, recipe: str | None, config: Path | None, given: dict[str, object] | None = None
) -> dict[str, object]:
    """A training configuration's values: those of the recipe, those of a YAML file over them, then `given`."""
    values = recipe_values(recipe, stage) if recipe else {}
    if config is not None:
        values = merged(values, read_yaml(config))
    return merged(values, given or {})


def with_required_missing(cls: type[Arguments], values: dict[str, object], required: Sequence[str]) -> Arguments:
    """An instance in which required fields without a value are tyro's MISSING, for the command line to fill."""
    absent = [name for name in required if name not in values]
    placeholders: dict[str, object] = dict.fromkeys(absent, "")
    instance = from_mapping(cls, merged(values, placeholders))
    for name in absent:
        object.__setattr__(instance, name, tyro.MISSING)
    return instance


def peek(words: Sequence[str], *names: str) -> dict[str, str]:
    """Values of `--name value` or `--name=value` among the words: what decides the other options' defaults."""
    found: dict[str, str] = {}
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in names:
            found[name] = value if equals else after
            if not found[name] or found[name].startswith("--"):
                raise ConfigError(f"{name} has no value; expected one after it")
    return found
