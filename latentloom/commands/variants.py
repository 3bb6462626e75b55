"""Sections with several variants on the command line.

`--model.quantizer.name fsq` decides which options exist. So the name is read before parsing, and the parser gets a
configuration that already has the variant.
"""

from collections.abc import Sequence
from typing import Any, TypeVar, get_type_hints

import tyro

from latentloom.commands.arguments import peek_options
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


def draft_training(cls: type[Training], values: dict[str, Any], argv: Sequence[str]) -> tuple[Training, list[str]]:
    """Build the configuration that the command line changes, with the variants that the command line names.

    Values are checked against each other only after parsing. A required field without a value is tyro's MISSING.

    Returns: The configuration, and the arguments that are left for the parser.
    """
    values, argv = _choose_variants(cls, values, list(argv), "")
    return build_unchecked(cls, values, tyro.MISSING), argv


def _choose_variants(
    cls: Any, values: dict[str, Any], argv: list[str], prefix: str
) -> tuple[dict[str, Any], list[str]]:
    """Set in `values` of the dataclass `cls` the variants and the optional sections that the command line names.

    Returns: The values, and the arguments without those that are done, such as `--model.mean-flow none`.
    """
    for name, hint in get_type_hints(cls).items():
        option = f"--{prefix}{name}".replace("_", "-")
        variant_classes, section_class = variants_by_name(hint), optional_section_type(hint)
        if variant_classes:
            variant = peek_options(argv, f"{option}.name").get(f"{option}.name")
            if variant is not None and variant not in variant_classes:
                raise ConfigError(f"{option}.name is {variant!r}; {suggest_nearest(variant, list(variant_classes))}")
            if variant is not None:
                values = merge_mappings(values, {name: {"name": variant}}, cls)
            section = values.get(name, {})
            section_class = None
            if isinstance(section, dict):
                section_class = variant_classes.get(str(section.get("name", next(iter(variant_classes)))))
        elif section_class:
            is_used, argv = _parse_optional_section(option, section_class, argv)
            if is_used is not None:
                values = values | {name: (values.get(name) or {}) if is_used else None}
        section = values.get(name, {} if variant_classes else None)
        if section_class and isinstance(section, dict):
            section, argv = _choose_variants(section_class, section, argv, f"{prefix}{name}.")
            values = values | {name: section}
    return values, argv


def _parse_optional_section(option: str, section: type[Any], argv: list[str]) -> tuple[bool | None, list[str]]:
    """Find out whether the command line uses an optional section.

    Returns: True for options of the section, False for `none`, None for neither; and the arguments without the `none`.
    """
    names = [word.split("=")[0].replace("_", "-") for word in argv]
    has_options = any(name.startswith(f"{option}.") for name in names)
    if option not in names:
        return has_options or None, argv
    i = names.index(option)
    _, equals, value = argv[i].partition("=")
    value = value if equals else " ".join(argv[i + 1 : i + 2])
    if value.lower() != "none" or has_options:
        example = f"{option}.{field_names(section)[0]}".replace("_", "-")
        raise ConfigError(
            f"{option} is given with {value or 'nothing'!r}; expected none, or an option of the section, such as {example}"
        )
    return False, argv[:i] + argv[i + (1 if equals else 2) :]


def explain_unknown_option(training: Any, option: str) -> str | None:
    """Explain why a configuration has no such option: it has a new name, or other variants have it."""
    path = option.removeprefix("--").replace("-", "_").split(".")
    if new := training.migration.renamed_fields.get(".".join(path)):
        return f"it is --{new.replace('_', '-')} now"
    for depth, name in enumerate(path[:-1]):
        variant_classes = variants_by_name(get_type_hints(type(training)).get(name))
        training, field = getattr(training, name, None), path[depth + 1]
        if training is None:
            return None
        owner_names = variants_with_field(variant_classes, field)
        if owner_names and training.name not in owner_names:
            section = ".".join(path[: depth + 1]).replace("_", "-")
            return f"it belongs to another variant; give --{section}.name {' or '.join(owner_names)}"
    return None
