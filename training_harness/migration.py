"""Migration of stored mappings from earlier formats to the current format.

Each kind of file has a format number and a list of migration steps. Each step converts one format to the next. A file without a
number has the first format or was written by hand. A step therefore converts only old names and keeps current names.
A new field needs no step: it gets its default when a mapping is read (`configuration.fill_defaults`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from training_harness.errors import ConfigError

Values = dict[str, Any]
MODEL_FORMAT_KEY = "latentloom_format"
"""Key of the format number in a model's config.json, which it shares with transformers."""


def identity(values: Values) -> Values:
    """Return the values unchanged."""
    return values


@dataclass(frozen=True, kw_only=True)
class MigrationStep:
    """Conversion from one format to the next: `convert` runs first, then the fields are renamed."""

    convert: Callable[[Values], Values] = identity
    """Conversion that renaming cannot express; it receives a copy of the values."""
    renamed_fields: Mapping[str, str] = field(default_factory=dict)
    """New name of each renamed field; nested fields are written as "model.name"."""


@dataclass(frozen=True)
class Migration:
    """Migration of one kind of file to the current format."""

    kind: str
    """Name for error messages, such as "tokenizer configuration"."""
    steps: tuple[MigrationStep, ...] = ()
    """Steps from format 1 to 2, from 2 to 3 and so on."""
    key: str = "format"
    """Key of the format number in a file."""

    @property
    def format(self) -> int:
        """Number of the current format."""
        return 1 + len(self.steps)

    @property
    def renamed_fields(self) -> dict[str, str]:
        """Current name of each field that was renamed in any format."""
        names: dict[str, str] = {}
        for step in self.steps:
            names = {old: step.renamed_fields.get(new, new) for old, new in names.items()} | dict(step.renamed_fields)
        return names

    def migrate(self, values: Mapping[str, Any]) -> Values:
        """Return `values` in the current format, without the format number.

        Raises:
            ConfigError: The format number is unknown.
        """
        migrated = _copy_nested(values)
        number = migrated.pop(self.key, 1)
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= self.format:
            raise ConfigError(
                f"{self.key} is {number!r} in a {self.kind}; expected a whole number from 1 to {self.format}; "
                "for a larger number install the later version of latentloom that wrote the file"
            )
        for step in self.steps[number - 1 :]:
            migrated = step.convert(migrated)
            for old, new in step.renamed_fields.items():
                _rename(migrated, old.split("."), new.split("."))
        return migrated

    def add_format_number(self, values: Mapping[str, Any]) -> Values:
        """Return `values` with the format number, as a file stores them; the first format has no number."""
        return {self.key: self.format, **values} if self.format > 1 else dict(values)


def nest_in_model(values: Values, options: Sequence[str]) -> Values:
    """Move options from the top level to the section `model`, unless there is one already."""
    if "model" in values:
        return values
    model = {name: values.pop(name) for name in options if name in values}
    return values | {"model": model} if model else values


def _copy_nested(values: Mapping[str, Any]) -> Values:
    return {name: _copy_nested(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def _rename(values: Values, old: list[str], new: list[str]) -> None:
    """Rename a field; keep it if the new name is taken, so that the reader reports the old name as unknown."""
    source = _section(values, old[:-1])
    if source is not None and old[-1] in source:
        target = _section(values, new[:-1], create=True)
        if target is not None and new[-1] not in target:
            target[new[-1]] = source.pop(old[-1])


def _section(values: Values, path: list[str], create: bool = False) -> Values | None:
    """Return the nested mapping at `path`, or None if it does not exist."""
    for name in path:
        if create and values.get(name) is None:
            values[name] = {}
        section = values.get(name)
        if not isinstance(section, dict):
            return None
        values = section
    return values
