"""Configuration by typed dataclasses: a strict loader from YAML mappings, and the conversion back.

The loader checks each value against the type of its field. It makes three conversions because of YAML 1.1: an int becomes a
float where a float is expected, a string such as `1e-4` becomes a float (YAML reads it as text), and false becomes `no` where
`no` is a choice (YAML reads it as a boolean). An unknown key is an error that suggests the nearest field.

A field may have a union of dataclasses as its type. Its section then holds one of several variants, selected by `name`.
"""

import dataclasses
import difflib
import types
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from training_harness.errors import ConfigError
from training_harness.files import write_text
from training_harness.migration import Migration

Config = TypeVar("Config")


def suggest_nearest(name: str, choices: list[str]) -> str:
    """Return the hint for an error message: "did you mean 'x'?", or the list of choices if none is similar."""
    close = difflib.get_close_matches(name, choices, n=1)
    return f"did you mean '{close[0]}'?" if close else f"expected one of: {', '.join(choices)}"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; an empty file gives an empty mapping.

    Raises:
        ConfigError: The file does not exist, is not valid YAML, or does not hold a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}; expected a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML ({' '.join(str(error).split())}); correct the file") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; expected a mapping of fields to values")
    return values


def variants_by_name(hint: Any) -> dict[str, type]:
    """Return the dataclasses of a union by their `name`; empty for any other type. The first one is the default."""
    members = _union_members(hint)
    if len(members) < 2 or not all(dataclasses.is_dataclass(m) and "name" in m.__dataclass_fields__ for m in members):
        return {}
    return {member.__dataclass_fields__["name"].default: member for member in members}


def optional_section_type(hint: Any) -> type | None:
    """Return `C` if the type is `C | None` with a dataclass `C`; None for any other type."""
    members = _union_members(hint)
    member = members[0] if len(members) == 1 else None
    return member if isinstance(member, type) and dataclasses.is_dataclass(member) else None


def _union_members(hint: Any) -> list[Any]:
    """Return the types of a union, without None; empty for any other type."""
    if get_origin(hint) not in (Union, types.UnionType):
        return []
    return [member for member in get_args(hint) if member is not type(None)]


def field_names(hint: Any) -> list[str]:
    """Return the field names of a dataclass, or of all variants of a union; empty for any other type."""
    classes: list[Any] = list(variants_by_name(hint).values()) or [hint] * dataclasses.is_dataclass(hint)
    return list(dict.fromkeys(field.name for cls in classes for field in dataclasses.fields(cls)))


def merge_mappings(base: Mapping[str, Any], overlay: Mapping[str, Any], hint: Any = None) -> dict[str, Any]:
    """Merge `overlay` into a copy of `base`, section by section.

    Args:
        base: Values with lower priority.
        overlay: Values with higher priority.
        hint: Type that the mapping configures: a dataclass, a union of variants, or None. If `overlay` selects another
            variant, the values of `base` for which this variant has no field are dropped.
    """
    result = dict(base)
    if variants := variants_by_name(hint):
        base_name = base.get("name", next(iter(variants)))
        name = overlay.get("name", base_name)
        hint = variants.get(name) if isinstance(name, str) else None
        if hint is not None and name != base_name:
            result = {key: value for key, value in base.items() if key in hint.__dataclass_fields__}
    hint = optional_section_type(hint) or hint
    hints = get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
    for key, value in overlay.items():
        base_value = result.get(key)
        if isinstance(base_value, Mapping) and isinstance(value, Mapping):
            value = merge_mappings(base_value, value, hints.get(key))
        result[key] = value
    return result


def from_mapping(cls: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    """Create an instance of a dataclass from a mapping.

    Args:
        cls: The dataclass.
        values: Field values; sections are nested mappings.
        prefix: Prefix of the field names in error messages, such as "model.".

    Raises:
        ConfigError: A field is unknown or missing, or a value has the wrong type. The message names the field.
    """
    arguments = _convert_arguments(cls, values, prefix, from_mapping)
    if missing := [name for name in _required_fields(cls) if name not in arguments]:
        hint = get_type_hints(cls)[missing[0]]
        raise ConfigError(f"missing field '{prefix}{missing[0]}'; expected a value of type {hint}")
    return cls(**arguments)


def build_unchecked(cls: type[Config], values: Mapping[str, Any], missing: Any = None) -> Config:
    """Create an instance like `from_mapping`, without the checks of `__post_init__`.

    Args:
        cls: The dataclass.
        values: Field values; sections are nested mappings.
        missing: Value for required fields that are absent from `values`.
    """

    def build(cls: type[Any], values: Mapping[str, Any], prefix: str) -> Any:
        arguments = dict.fromkeys(_required_fields(cls), missing) | _convert_arguments(cls, values, prefix, build)
        instance = object.__new__(cls)
        for field in dataclasses.fields(cls):
            if field.name not in arguments:
                factory = field.default_factory
                arguments[field.name] = field.default if factory is dataclasses.MISSING else factory()
            object.__setattr__(instance, field.name, arguments[field.name])
        return instance

    return build(cls, values, "")


def fill_defaults(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with the defaults of all absent fields, as plain values."""
    return to_mapping(build_unchecked(cls, values))


def build_section(hint: Any, values: Mapping[str, Any], name: str) -> Any:
    """Create an instance from the section `name`; `hint` is a dataclass or a union of variants."""
    return _convert(hint, values, name, from_mapping)


InstanceBuilder = Callable[[type[Any], Mapping[str, Any], str], Any]


def _required_fields(cls: type[Any]) -> list[str]:
    return [
        field.name
        for field in dataclasses.fields(cls)
        if field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]


def _convert_arguments(
    cls: type[Any], values: Mapping[str, Any], prefix: str, build: InstanceBuilder
) -> dict[str, Any]:
    """Check and convert the values of the fields of `cls`."""
    hints, arguments = get_type_hints(cls), {}
    fields = [field.name for field in dataclasses.fields(cls) if field.init]
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"unknown field '{prefix}{key}'; {suggest_nearest(str(key), fields)}")
        arguments[key] = _convert(hints[key], value, f"{prefix}{key}", build)
    return arguments


def variants_with_field(variants: Mapping[str, type[Any]], field: str) -> list[str]:
    """Return the names of the variants that have a field."""
    return [name for name, cls in variants.items() if field in cls.__dataclass_fields__]


def _select_variant(variants: Mapping[str, type[Any]], values: Mapping[str, Any], section: str) -> type[Any]:
    """Return the variant that a section names; raise ConfigError for an unknown name and for fields of other variants."""
    name = values.get("name", next(iter(variants)))
    if not isinstance(name, str) or name not in variants:
        raise ConfigError(f"{section}.name is {name!r}; {suggest_nearest(str(name), list(variants))}")
    fields = variants[name].__dataclass_fields__
    for key in values:
        if key not in fields:
            hint = suggest_nearest(str(key), list(fields))
            if owners := variants_with_field(variants, str(key)):
                hint = f"expected it only with {', '.join(owners)}; remove it"
            raise ConfigError(f"unknown field '{section}.{key}' for the {section.split('.')[-1]} {name}; {hint}")
    return variants[name]


def _convert(hint: Any, value: Any, name: str, build: InstanceBuilder) -> Any:
    """Check that `value` has the type `hint` and convert it where YAML requires it; `name` is for error messages."""
    origin, type_arguments = get_origin(hint), get_args(hint)
    variants, optional = variants_by_name(hint), optional_section_type(hint)
    if dataclasses.is_dataclass(hint) or variants or (optional and value is not None):
        if isinstance(value, tuple(variants.values()) or optional or hint):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is {value!r}; expected a section of fields")
        cls = _select_variant(variants, value, name) if variants else optional or hint
        return build(cls, value, f"{name}.")
    if origin in (Union, types.UnionType):
        for exact in (
            True,
            False,
        ):  # `3` for `int | float` stays an int; `1e-4` becomes a float only if no type fits as is
            for member in type_arguments:
                if exact and type(value) is not member and get_origin(member) is None:
                    continue
                try:
                    return _convert(member, value, name, build)
                except ConfigError:
                    continue
        raise _type_error(hint, value, name)
    if origin is Literal:
        choices = type_arguments
        value = "no" if value is False and "no" in choices else value
        if value not in choices or type(value) not in {type(choice) for choice in choices}:
            raise ConfigError(
                f"{name} is {value!r}; {suggest_nearest(str(value), [str(choice) for choice in choices])}"
            )
        return value
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise _type_error(hint, value, name)
        has_fixed_length = origin is tuple and type_arguments[-1] is not Ellipsis
        item_types = type_arguments if has_fixed_length else (type_arguments[0],) * len(value)
        if len(item_types) != len(value):
            raise _type_error(hint, value, name)
        pairs = enumerate(zip(item_types, value, strict=True))
        return origin(_convert(item_type, item, f"{name}[{i}]", build) for i, (item_type, item) in pairs)
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise _type_error(hint, value, name) from None
    if hint is Path and isinstance(value, str):
        return Path(value).expanduser()
    if hint in (None, type(None)):
        if value is not None:
            raise _type_error(hint, value, name)
        return None
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _type_error(hint, value, name)
    return value


def _type_error(hint: Any, value: Any, name: str) -> ConfigError:
    expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    return ConfigError(f"{name} is {value!r}; expected {expected.replace('NoneType', 'none').replace('None', 'none')}")


def to_mapping(config: Any) -> dict[str, Any]:
    """Convert a dataclass to plain values for YAML and JSON."""
    return {field.name: _to_plain_value(getattr(config, field.name)) for field in dataclasses.fields(config)}


def to_stored_mapping(config: Any) -> dict[str, Any]:
    """Convert a dataclass to plain values; a dataclass with a `migration` also gets the format number of its files."""
    values = to_mapping(config)
    migration: Migration | None = getattr(config, "migration", None)
    return values if migration is None else migration.add_format_number(values)


def non_default_values(config: Any, exclude: Collection[str]) -> dict[str, Any]:
    """Return the plain values of a dataclass that differ from the field defaults, without the fields in `exclude`."""
    values = {}
    for field in dataclasses.fields(config):
        factory, value = field.default_factory, getattr(config, field.name)
        default = field.default if factory is dataclasses.MISSING else factory()
        if field.name not in exclude and value != default:
            values[field.name] = _to_plain_value(value)
    return values


def _to_plain_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, list | tuple):
        return [_to_plain_value(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def find_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the (old, new) values of all fields that differ, by their full names such as "model.name"."""
    differences: dict[str, tuple[Any, Any]] = {}
    for name in {**old, **new}:
        old_value, new_value = old.get(name), new.get(name)
        if isinstance(old_value, Mapping) and isinstance(new_value, Mapping):
            differences |= find_differences(old_value, new_value, f"{prefix}{name}.")
        elif old_value != new_value:
            differences[prefix + name] = (old_value, new_value)
    return differences


def write_yaml(path: Path, config: Any) -> None:
    """Write a dataclass to a YAML file atomically."""
    # Without allow_unicode: PyYAML does not read back every character that it writes raw, for example U+0085.
    write_text(path, yaml.safe_dump(to_stored_mapping(config), sort_keys=False))
