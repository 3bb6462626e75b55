"""Sections with several variants on the command line.

`--model.quantizer.name fsq` decides which options there are, so it is looked at before the words are parsed: the parser is
given a configuration that has the variant already.
"""

from collections.abc import Sequence
from typing import Any, TypeVar, get_type_hints

import tyro

from latentloom.commands.arguments import peek
from training_harness.configuration import (
    build_unchecked,
    field_names,
    merge_mappings,
    optional_section_type,
    suggest_nearest,
    variants_by_name,
    variants_with_field,
)
from training_harness.errors import ConfigError

Training = TypeVar("Training")


def starting_point(cls: type[Training], values: dict[str, Any], words: Sequence[str]) -> tuple[Training, list[str]]:
    """What the command line changes, and the words that are left for the parser.

    The values are checked against one another only once the words are parsed. Required fields without a value are tyro's
    MISSING, for the command line to fill.
    """
    values, words = _with_variants(cls, values, list(words), "")
    return build_unchecked(cls, values, tyro.MISSING), words


def _with_variants(cls: Any, values: dict[str, Any], words: list[str], where: str) -> tuple[dict[str, Any], list[str]]:
    """`values` of the dataclass `cls` with the variants and the optional sections that the words ask for."""
    for name, hint in get_type_hints(cls).items():
        option, known, optional = (
            f"--{where}{name}".replace("_", "-"),
            variants_by_name(hint),
            optional_section_type(hint),
        )
        if known:
            given = peek(words, f"{option}.name").get(f"{option}.name")
            if given is not None and given not in known:
                raise ConfigError(f"{option}.name is {given!r}; {suggest_nearest(given, list(known))}")
            if given is not None:
                values = merge_mappings(values, {name: {"name": given}}, cls)
            section = values.get(name, {})
            optional = known.get(str(section.get("name", next(iter(known))))) if isinstance(section, dict) else None
        elif optional:
            asked, words = _asked_for(option, optional, words)
            if asked is not None:
                values = values | {name: (values.get(name) or {}) if asked else None}
        section = values.get(name, {} if known else None)
        if optional and isinstance(section, dict):
            section, words = _with_variants(optional, section, words, f"{where}{name}.")
            values = values | {name: section}
    return values, words


def _asked_for(option: str, section: type[Any], words: list[str]) -> tuple[bool | None, list[str]]:
    """Whether an optional section is given options, or `none`, or (None) neither; and the words without that `none`."""
    names = [word.split("=")[0].replace("_", "-") for word in words]
    inside = any(name.startswith(f"{option}.") for name in names)
    if option not in names:
        return inside or None, words
    at = names.index(option)
    _, equals, value = words[at].partition("=")
    value = value if equals else " ".join(words[at + 1 : at + 2])
    if value.lower() != "none" or inside:
        example = f"{option}.{field_names(section)[0]}".replace("_", "-")
        raise ConfigError(
            f"{option} is given with {value or 'nothing'!r}; expected none, or options of its own in its place, such as {example}"
        )
    return False, words[:at] + words[at + (1 if equals else 2) :]


def explained(training: Any, option: str) -> str | None:
    """What is known of an option that a configuration does not have: its present name, or the variants that have it."""
    path = option.removeprefix("--").replace("-", "_").split(".")
    if new := training.migration.renamed_fields.get(".".join(path)):
        return f"it is --{new.replace('_', '-')} now"
    for depth, name in enumerate(path[:-1]):
        known = variants_by_name(get_type_hints(type(training)).get(name))
        training, field = getattr(training, name, None), path[depth + 1]
        if training is None:
            return None
        others = variants_with_field(known, field)
        if others and training.name not in others:
            where = ".".join(path[: depth + 1]).replace("_", "-")
            return f"it belongs to another variant; give --{where}.name {' or '.join(others)}"
    return None
