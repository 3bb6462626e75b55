"""Parses command-line arguments into typed dataclasses. Every error is one line."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import tyro

import stage1_tokenizer.migration
import stage2_prior.migration
from latentloom.commands.option_help import Option, build_help_page, format_help
from latentloom.recipes import override_values, recipe_names, recipe_values
from training_harness.configuration import read_yaml
from training_harness.errors import ConfigError, UserError

Arguments = TypeVar("Arguments")
MIGRATIONS = {"tokenizer": stage1_tokenizer.migration.TRAINING, "prior": stage2_prior.migration.TRAINING}
MAX_WIDTH = 120  # of a page of help
ONE_VARIANT = (tyro.conf.AvoidSubcommands,)  # otherwise tyro makes a subcommand of each variant of a section


Explain = Callable[[str], str | None]
"""Takes the name of an unknown option; returns a hint, such as its new name, or None."""


def parse(
    cls: type[Arguments],
    verb: str,
    argv: Sequence[str],
    groups: Mapping[str, tuple[str, ...]],
    default: Arguments | None = None,
    explain: Explain = lambda option: None,
    note: str = "",
) -> Arguments:
    """Parse command-line arguments into an instance of the dataclass `cls`.

    Args:
        groups: Titles of the groups in `--help`, with the fields in each.
        default: An instance with the defaults; it also decides the variant of each section that has several.
        explain: Adds a hint to the error for an unknown option.
        note: Sentence for `--help` on where the defaults come from.
    Raises: UserError for arguments that do not fit.
    """
    build_page = partial(build_help_page, verb, cls, default, groups, note)  # needed for help and for errors only
    if {"-h", "--help"} & set(argv):
        print(format_help(build_page(), min(shutil.get_terminal_size().columns, MAX_WIDTH)))
        raise SystemExit(0)
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            parsed, unknown = tyro.cli(
                cls,
                args=list(argv),
                prog=f"latentloom {verb}",
                default=tyro.MISSING_NONPROP if default is None else default,
                return_unknown_args=True,
                config=ONE_VARIANT,
            )
    except SystemExit as error:
        reason = _find_user_error(error) or _summarize_parser_error(
            messages.getvalue(), argv, build_page().options, explain
        )
        raise UserError(f"{reason}; see latentloom {verb} --help") from None
    if unknown:
        raise UserError(
            f"{_describe_unknown_option(unknown[0], build_page().options, explain)}; see latentloom {verb} --help"
        )
    return _expand_home(parsed)


def _expand_home(value: Any) -> Any:
    """Expand `~` in every path of the parsed options. Shells expand it in `--output ~/runs` but not in `--output=~/runs`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            object.__setattr__(value, field.name, _expand_home(getattr(value, field.name)))
        return value
    if isinstance(value, Path):
        return value.expanduser()
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def _describe_unknown_option(word: str, options: Sequence[Option], explain: Explain) -> str:
    name = word.split("=")[0]
    if (explanation := explain(name)) is not None:
        return f"unknown option '{name}'; {explanation}"
    close = difflib.get_close_matches(name, [name for option in options for name in option.names], n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"unknown {'option' if name.startswith('-') else 'argument'} '{name}'{hint}"


def _find_user_error(error: BaseException) -> str:
    """Return the message of a UserError that a dataclass's own check raised below `error`, or ""."""
    cause = error.__context__
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__context__
    return "" if cause is None else str(cause)


def _summarize_parser_error(message: str, argv: Sequence[str], options: Sequence[Option], explain: Explain) -> str:
    """Turn tyro's message, which is in a box, into one line: the option, its value and what was expected."""
    blocks = _split_box(message)
    text = " ".join(blocks[0])
    for block in blocks:
        if block[0].startswith("Unrecognized options") and len(block) > 1:
            return _describe_unknown_option(block[1].split()[0], options, explain)
    if text.startswith("Missing from"):
        missing = [line.split()[0] for line in blocks[0][1:] if line.startswith("--")]
        return f"{' and '.join(missing)} missing; expected a value after {'it' if len(missing) == 1 else 'each'}"
    if match := re.match(r"Error parsing (--[\w.-]+):", text):
        name = match[1]
        expected = [option.values for option in options if name in option.names]
        if expected and (values := peek_options(argv, name)):
            return f"{name} is {values[name]!r}; expected {expected[0]}"
    return text.rstrip(".")


def _split_box(message: str) -> list[list[str]]:
    """Split a box into the paragraphs between its rules. Its characters are Unicode, or ASCII if the output allows no other."""
    blocks: list[list[str]] = [[]]
    for line in message.splitlines()[1:]:  # the first line is the title
        line = line.strip().strip("│|").strip()
        if set(line) <= set("─╰╯+-"):
            blocks.append([])
        else:
            blocks[-1].append(line)
    return [block for block in blocks if block] or [[""]]


def training_values(
    stage: str, recipe: str | None, config: Path | None, overrides: dict[str, object] | None = None
) -> dict[str, object]:
    """Compose the values of a training configuration: the recipe, then a YAML file, then `overrides`."""
    migration = MIGRATIONS[stage]
    values = migration.migrate(recipe_values(recipe, stage)) if recipe else {}
    if config is not None:
        config_values = read_yaml(config)
        try:
            config_values = migration.migrate(config_values)
        except ConfigError as error:
            raise ConfigError(f"{config}: {error}") from None
        values = override_values(stage, values, config_values)
    return override_values(stage, values, overrides or {})


def peek_recipe_and_config(argv: Sequence[str]) -> tuple[str | None, Path | None]:
    """Read --recipe and --config before parsing, because they decide the defaults of the other options."""
    values = peek_options(argv, "--recipe", "--config")
    return values.get("--recipe"), Path(values["--config"]) if "--config" in values else None


def describe_recipes(text: str, stage: str, default: str) -> dict[str, str]:
    """Make the metadata of a field that takes a recipe: a help text with the names of the stage's recipes."""
    return {"help": f"{text}: {', '.join(recipe_names(stage))}. (default: {default})"}


def describe_defaults(recipe: str | None, config: Path | None) -> str:
    """Write the sentence for `--help` on where the defaults come from."""
    origins = [f"the recipe {recipe}"] * (recipe is not None) + [str(config)] * (config is not None)
    return f"The defaults below come from {' and '.join(origins)}; --recipe and --config change them."


def peek_options(argv: Sequence[str], *names: str) -> dict[str, str]:
    """Read the values of some options, written `--name value` or `--name=value`, before parsing.

    Raises: ConfigError for an option without a value.
    """
    values: dict[str, str] = {}
    for word, next_word in zip_longest(argv, argv[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name in names:
            values[name] = value if equals else next_word
            if not values[name] or values[name].startswith("--"):
                raise ConfigError(f"{name} has no value; expected one after it")
    return values
