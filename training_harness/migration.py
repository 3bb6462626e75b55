"""Stored mappings of earlier formats, brought to the present one before they are read or compared.

Each kind of file has a format number and a list of steps, each from one format to the next. A file without a number is of
the first format, or was written by hand: a step goes by the names that it finds and leaves present names as they are.
A field that was added needs no step: it takes its default where a mapping is read (`configuration.with_defaults`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from training_harness.errors import ConfigError

Values = dict[str, Any]
MODEL_FORMAT_KEY = "latentloom_format"
"""Where a model's config.json, which is one of transformers', has its number."""


def identity(values: Values) -> Values:
    return values


@dataclass(frozen=True, kw_only=True)
class MigrationStep:
    """From one format to the next: first `change`, then the fields that have another name, by their whole names."""

    convert: Callable[[Values], Values] = identity
    """What renaming cannot express; it is given a copy."""
    renamed_fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Migration:
    """How the files of one kind are brought to the present format."""

    kind: str
    """For messages, such as "tokenizer configuration"."""
    steps: tuple[MigrationStep, ...] = ()
    """From format 1 to 2, from 2 to 3 and so on."""
    key: str = "format"
    """Under which a file holds its number."""

    @property
    def format(self) -> int:
        """The number of the present format."""
        return 1 + len(self.steps)

    @property
    def renamed_fields(self) -> dict[str, str]:
        """Present names of the fields that had another one in any format."""
        names: dict[str, str] = {}
        for step in self.steps:
            names = {old: step.renamed_fields.get(new, new) for old, new in names.items()} | dict(step.renamed_fields)
        return names

    def migrate(self, values: Mapping[str, Any]) -> Values:
        """`values` in the present format, without the number. Raises ConfigError for a format that is not known."""
        found = _copy_nested(values)
        number = found.pop(self.key, 1)
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= self.format:
            raise ConfigError(
                f"{self.key} is {number!r} in a {self.kind}; expected a whole number from 1 to {self.format}; a larger one was "
                "written by a later version of latentloom, which reads it"
            )
        for step in self.steps[number - 1 :]:
            found = step.convert(found)
            for old, new in step.renamed_fields.items():
                _rename(found, old.split("."), new.split("."))
        return found

    def add_format_number(self, values: Mapping[str, Any]) -> Values:
        """`values` as a file holds them. The first format has no number."""
        return {self.key: self.format, **values} if self.format > 1 else dict(values)


def _copy_nested(values: Mapping[str, Any]) -> Values:
    return {name: _copy_nested(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def _rename(values: Values, old: list[str], new: list[str]) -> None:
    """Leaves the field where it is when the new name is taken, so that reading refuses it."""
    source = _section(values, old[:-1])
    if source is not None and old[-1] in source:
        target = _section(values, new[:-1], make=True)
        if target is not None and new[-1] not in target:
            target[new[-1]] = source.pop(old[-1])


def _section(values: Values, path: list[str], make: bool = False) -> Values | None:
    for name in path:
        if make and values.get(name) is None:
            values[name] = {}
        below = values.get(name)
        if not isinstance(below, dict):
            return None
        values = below
    return values
