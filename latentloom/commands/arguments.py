"""Command-line arguments from typed dataclasses, with every mistake as one line."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import tyro

import stage1_tokenizer.migration
import stage2_prior.migration
from latentloom.commands.option_help import Option, format_help, help_page
from latentloom.recipes import overlaid, recipe_names, recipe_values
from training_harness.configuration import read_yaml
from training_harness.errors import ConfigError, UserError

Arguments = TypeVar("Arguments")
MIGRATIONS = {"tokenizer": stage1_tokenizer.migration.TRAINING, "prior": stage2_prior.migration.TRAINING}
MAX_WIDTH = 120  # of a page of help
TRAINING_GROUPS = {
    "configuration": ("recipe", "config", "prior"),
    "training": (
        *(
            "max_steps",
            "minutes",
            "batch_size",
            "accumulation_steps",
            "class_dropout",
            "degradation",
            "perceptual",
            "seed",
        ),
        *("mixed_precision", "matmul_precision", "compile", "gradient_checkpointing"),
    ),
    "logging and checkpoints": (
        "log_every",
        "sample_every",
        "checkpoint_every",
        "keep_checkpoints",
        "resume",
        "report_to",
    ),
    "checks before training": ("dry_run", "overfit_batch"),
}
"""Groups of options that both training verbs have. Each verb adds a group for its data."""
ONE_VARIANT = (tyro.conf.AvoidSubcommands,)  # tyro would make a subcommand of each variant of a section


Explain = Callable[[str], str | None]
"""Returns what is known of an option that does not exist, such as its present name."""


def parse(
    cls: type[Arguments],
    verb: str,
    words: Sequence[str],
    groups: Mapping[str, tuple[str, ...]],
    default: Arguments | None = None,
    explain: Explain = lambda option: None,
    note: str = "",
) -> Arguments:
    """Parse command-line words into the dataclass `cls`.

    Args:
        groups: Titles of the groups in `--help`, with the fields in each.
        default: An instance with the defaults; it also decides the variant of each section that has several.
        explain: Called with the name of an unknown option.
        note: Which defaults `--help` shows.
    Raises: UserError for words that do not fit.
    """
    page = help_page(verb, cls, default, groups, note)
    if {"-h", "--help"} & set(words):
        print(format_help(page, min(shutil.get_terminal_size().columns, MAX_WIDTH)))
        raise SystemExit(0)
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            parsed, unknown = tyro.cli(
                cls,
                args=list(words),
                prog=f"latentloom {verb}",
                default=tyro.MISSING_NONPROP if default is None else default,
                return_unknown_args=True,
                config=ONE_VARIANT,
            )
    except SystemExit as error:
        reason = _user_error(error) or _one_line(messages.getvalue(), words, page.options, explain)
        raise UserError(f"{reason}; see latentloom {verb} --help") from None
    if unknown:
        raise UserError(f"{_unknown_option(unknown[0], page.options, explain)}; see latentloom {verb} --help")
    return _expand_home(parsed)


def _expand_home(value: Any) -> Any:
    """The parsed options with `~` expanded in every path: a shell does it in `--output ~/runs`, and not in `--output=~/runs`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            object.__setattr__(value, field.name, _expand_home(getattr(value, field.name)))
        return value
    if isinstance(value, Path):
        return value.expanduser()
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def _unknown_option(word: str, options: Sequence[Option], explain: Explain) -> str:
    name = word.split("=")[0]
    if (explanation := explain(name)) is not None:
        return f"unknown option '{name}'; {explanation}"
    close = difflib.get_close_matches(name, [name for option in options for name in option.names], n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"unknown {'option' if name.startswith('-') else 'argument'} '{name}'{hint}"


def _user_error(error: BaseException) -> str:
    """Return the message of a UserError that a dataclass's own check raised below `error`, or ""."""
    cause = error.__context__
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__context__
    return "" if cause is None else str(cause)


def _one_line(message: str, words: Sequence[str], options: Sequence[Option], explain: Explain) -> str:
    """Turn tyro's framed message about `words` into one line with the option, the value and what was expected."""
    blocks = _blocks(message)
    text = " ".join(blocks[0])
    for block in blocks:
        if block[0].startswith("Unrecognized options") and len(block) > 1:
            return _unknown_option(block[1].split()[0], options, explain)
    if text.startswith("Missing from"):
        missing = [line.split()[0] for line in blocks[0][1:] if line.startswith("--")]
        return f"{' and '.join(missing)} missing; expected a value after {'it' if len(missing) == 1 else 'each'}"
    if match := re.match(r"Error parsing (--[\w.-]+):", text):
        name = match[1]
        expected = [option.values for option in options if name in option.names]
        if expected and (values := peek(words, name)):
            return f"{name} is {values[name]!r}; expected {expected[0]}"
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
    values = migration.present(recipe_values(recipe, stage)) if recipe else {}
    if config is not None:
        config_values = read_yaml(config)
        try:
            config_values = migration.present(config_values)
        except ConfigError as error:
            raise ConfigError(f"{config}: {error}") from None
        values = overlaid(stage, values, config_values)
    return overlaid(stage, values, given or {})


def recipe_and_config(words: Sequence[str]) -> tuple[str | None, Path | None]:
    """What --recipe and --config name: they decide the defaults of the other options, so they are looked at first."""
    given = peek(words, "--recipe", "--config")
    return given.get("--recipe"), Path(given["--config"]) if "--config" in given else None


def recipe_help(text: str, stage: str, default: str) -> dict[str, str]:
    """Return the metadata of a field that takes a recipe: its help text, with the names of the recipes and the default."""
    return {"help": f"{text}: {', '.join(recipe_names(stage))}. (default: {default})"}


def defaults_note(recipe: str | None, config: Path | None) -> str:
    """Say in a page of help where its defaults come from."""
    origins = [f"the recipe {recipe}"] * (recipe is not None) + [str(config)] * (config is not None)
    return f"The defaults below come from {' and '.join(origins)}; --recipe and --config change them."


def peek(words: Sequence[str], *names: str) -> dict[str, str]:
    """Values of `--name value` or `--name=value` among the words: what decides the other options' defaults."""
    found: dict[str, str] = {}
    for word, after in zip_longest(words, words[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name in names:
            found[name] = value if equals else after
            if not found[name] or found[name].startswith("--"):
                raise ConfigError(f"{name} has no value; expected one after it")
    return found
