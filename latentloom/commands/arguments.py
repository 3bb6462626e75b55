"""Command-line arguments from typed dataclasses, with every mistake as one line."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

import stage1_tokenizer.migration
import stage2_prior.migration
from latentloom.recipes import override_values, recipe_names, recipe_values
from training_harness.configuration import read_yaml
from training_harness.errors import ConfigError, UserError

Arguments = TypeVar("Arguments")
MIGRATIONS = {"tokenizer": stage1_tokenizer.migration.TRAINING, "prior": stage2_prior.migration.TRAINING}
ONE_VARIANT = (tyro.conf.AvoidSubcommands,)  # tyro would make a subcommand of each variant of a section


Explain = Callable[[str], str | None]
"""What is known of an option that is none, such as its present name."""


def parse(
    cls: type[Arguments],
    verb: str,
    arguments: Sequence[str],
    default: Arguments | None = None,
    explain: Explain = lambda option: None,
) -> Arguments:
    """An instance of the dataclass `cls` from command-line words; raises UserError for words that do not fit.

    Of a section with several variants, the one that `default` holds is parsed.
    """
    said, prog = io.StringIO(), f"latentloom {verb}"
    start = tyro.MISSING_NONPROP if default is None else default
    if {"-h", "--help"} & set(arguments):
        tyro.cli(cls, args=["--help"], prog=prog, default=start, config=ONE_VARIANT)
    try:
        with contextlib.redirect_stderr(said):
            parsed, unknown = tyro.cli(
                cls, args=list(arguments), prog=prog, default=start, return_unknown_args=True, config=ONE_VARIANT
            )
    except SystemExit as refused:
        reason = _own_error(refused) or _in_one_line(said.getvalue(), arguments, _options(cls, default), explain)
        raise UserError(f"{reason}; see latentloom {verb} --help") from None
    if unknown:
        raise UserError(f"{_unknown(unknown[0], _options(cls, default), explain)}; see latentloom {verb} --help")
    return _with_home(parsed)


def _with_home(value: Any) -> Any:
    """The parsed options with `~` expanded in every path: a shell does it in `--output ~/runs`, and not in `--output=~/runs`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            object.__setattr__(value, field.name, _with_home(getattr(value, field.name)))
        return value
    if isinstance(value, Path):
        return value.expanduser()
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def _options(cls: type, default: object) -> list[str]:
    """The options that --help lists."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        start = tyro.MISSING_NONPROP if default is None else default
        tyro.cli(cls, args=["--help"], prog="", default=start, config=ONE_VARIANT)
    return re.findall(r"--[\w.-]+", said.getvalue())


def _unknown(word: str, options: list[str], explain: Explain) -> str:
    name = word.split("=")[0]
    if (known := explain(name)) is not None:
        return f"unknown option '{name}'; {known}"
    close = difflib.get_close_matches(name, options, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"unknown {'option' if name.startswith('-') else 'argument'} '{name}'{hint}"


def _own_error(error: BaseException) -> str:
    """The message of the UserError that a dataclass's own check raised below `error`, or ""."""
    below = error.__context__
    while below is not None and not isinstance(below, UserError):
        below = below.__context__
    return "" if below is None else str(below)


def _in_one_line(message: str, words: Sequence[str], options: list[str], explain: Explain) -> str:
    """What tyro says in a framed box about `words`, as one line that names the option, the value and what was expected."""
    blocks = _blocks(message)
    text = " ".join(blocks[0])
    for block in blocks:
        if block[0].startswith("Unrecognized options") and len(block) > 1:
            return _unknown(block[1].split()[0], options, explain)
    if text.startswith("Missing from"):
        missing = [line.split()[0] for line in blocks[0][1:] if line.startswith("--")]
        return f"{' and '.join(missing)} missing; expected a value after {'it' if len(missing) == 1 else 'each'}"
    if wrong := re.match(r"Error parsing (--[\w.-]+):", text):
        name = wrong[1]
        kinds = [line.removeprefix(name).strip() for block in blocks[1:] for line in block if line.startswith(name)]
        if kinds and (given := peek(words, name)):
            return f"{name} is {given[name]!r}; expected {kinds[0]}"
    return text.rstrip(".")


def _blocks(message: str) -> list[list[str]]:
    """The paragraphs between the rules of a box, drawn in Unicode or, where the output knows none, in ASCII."""
    blocks: list[list[str]] = [[]]
    for line in message.splitlines()[1:]:  # the first is the title
        line = line.strip().strip("│|").strip()
        if set(line) <= set("─╰╯+-"):
            blocks.append([])
        else:
            blocks[-1].append(line)
    return [block for block in blocks if block] or [[""]]


def training_values(
    stage: str, recipe: str | None, config: Path | None, given: dict[str, object] | None = None
) -> dict[str, object]:
    """A training configuration's values: those of the recipe, those of a YAML file over them, then `given`."""
    migration = MIGRATIONS[stage]
    values = migration.migrate(recipe_values(recipe, stage)) if recipe else {}
    if config is not None:
        values = override_values(stage, values, migration.migrate(read_yaml(config)))
    return override_values(stage, values, given or {})


def recipe_and_config(words: Sequence[str]) -> tuple[str | None, Path | None]:
    """What --recipe and --config name: they decide the defaults of the other options, so they are looked at first."""
    given = peek(words, "--recipe", "--config")
    return given.get("--recipe"), Path(given["--config"]) if "--config" in given else None


def recipe_help(what: str, stage: str) -> Any:
    """What an option that takes a recipe says in --help: the names there are."""
    return tyro.conf.arg(help=f"{what}: {', '.join(recipe_names(stage))}.")


def peek(words: Sequence[str], *names: str) -> dict[str, str]:
    """Values of `--name value` or `--name=value` among the words: what decides the other options' defaults."""
    found: dict[str, str] = {}
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name in names:
            found[name] = value if equals else after
            if not found[name] or found[name].startswith("--"):
                raise ConfigError(f"{name} has no value; expected one after it")
    return found
