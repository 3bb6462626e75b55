"""Typed dataclasses as configuration: a strict loader from YAML mappings, and the way back.

Each value is checked against its field's type. Three conversions are made, since YAML asks for them: an int where a float
is expected, a string such as `1e-4`, which YAML 1.1 does not read as a number, and false where the choice is `no`, which
it reads as a truth value. A key that no field has is an error that suggests the nearest one.

A field whose type is a union of dataclasses holds one of several variants, which the section's `name` chooses.
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
    """`; did you mean 'x'?`, or the choices when none is near: the end of an error's line."""
    close = difflib.get_close_matches(name, choices, n=1)
    return f"did you mean '{close[0]}'?" if close else f"expected one of: {', '.join(choices)}"


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}; expected a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML ({' '.join(str(error).split())}); mend the file") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; expected a mapping of fields to values")
    return values


def variants_by_name(hint: Any) -> dict[str, type]:
    """The dataclasses of a union, by their `name`; empty for any other type. The first is the default."""
    options = _union_members(hint)
    if len(options) < 2 or not all(dataclasses.is_dataclass(o) and "name" in o.__dataclass_fields__ for o in options):
        return {}
    return {option.__dataclass_fields__["name"].default: option for option in options}


def optional_section_type(hint: Any) -> type | None:
    """The dataclass of a section that may be none, or None for any other type."""
    options = _union_members(hint)
    one = options[0] if len(options) == 1 else None
    return one if isinstance(one, type) and dataclasses.is_dataclass(one) else None


def _union_members(hint: Any) -> list[Any]:
    """The types of a union, without none."""
    if get_origin(hint) not in (Union, types.UnionType):
        return []
    return [option for option in get_args(hint) if option is not type(None)]


def field_names(hint: Any) -> list[str]:
    """Of a dataclass, or of all variants of a union; none of any other type."""
    options: list[Any] = list(variants_by_name(hint).values()) or [hint] * dataclasses.is_dataclass(hint)
    return list(dict.fromkeys(field.name for option in options for field in dataclasses.fields(option)))


def merge_mappings(base: Mapping[str, Any], overlay: Mapping[str, Any], hint: Any = None) -> dict[str, Any]:
    """`base` with the values of `overlay` in place of its own, section by section.

    With the `hint` of what they configure, a dataclass or a union of variants: where `overlay` names another variant, the
    values of `base` that the variant has no field for are left out.
    """
    result = dict(base)
    if known := variants_by_name(hint):
        before = base.get("name", next(iter(known)))
        name = overlay.get("name", before)
        hint = known.get(name) if isinstance(name, str) else None
        if hint is not None and name != before:
            result = {key: value for key, value in base.items() if key in hint.__dataclass_fields__}
    hint = optional_section_type(hint) or hint
    hints = get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
    for key, value in overlay.items():
        under = result.get(key)
        both = isinstance(under, Mapping) and isinstance(value, Mapping)
        result[key] = merge_mappings(under, value, hints.get(key)) if both else value  # type: ignore[arg-type]
    return result


def from_mapping(cls: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """An instance of the dataclass `cls` from a mapping; raises ConfigError at the first key or value that does not fit."""
    arguments = _convert_arguments(cls, values, where, from_mapping)
    if missing := [name for name in _required_fields(cls) if name not in arguments]:
        hint = get_type_hints(cls)[missing[0]]
        raise ConfigError(f"missing field '{where}{missing[0]}'; expected a value of type {hint}")
    return cls(**arguments)


def build_unchecked(cls: type[Config], values: Mapping[str, Any], missing: Any = None) -> Config:
    """As `from_mapping`, without the checks of `__post_init__`; required fields that have no value yet get `missing`."""

    def build(cls: type[Any], values: Mapping[str, Any], where: str) -> Any:
        arguments = dict.fromkeys(_required_fields(cls), missing) | _convert_arguments(cls, values, where, build)
        instance = object.__new__(cls)
        for field in dataclasses.fields(cls):
            if field.name not in arguments:
                factory = field.default_factory
                arguments[field.name] = field.default if factory is dataclasses.MISSING else factory()
            object.__setattr__(instance, field.name, arguments[field.name])
        return instance

    return build(cls, values, "")


def fill_defaults(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the defaults of the fields that they lack, as `to_mapping` gives them."""
    return to_mapping(build_unchecked(cls, values))


def build_section(hint: Any, values: Mapping[str, Any], where: str) -> Any:
    """An instance from a section of fields. `hint` is a dataclass or a union of variants, `where` the section's name."""
    return _convert(hint, values, where, from_mapping)


InstanceBuilder = Callable[[type[Any], Mapping[str, Any], str], Any]


def _required_fields(cls: type[Any]) -> list[str]:
    return [
        field.name
        for field in dataclasses.fields(cls)
        if field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]


def _convert_arguments(cls: type[Any], values: Mapping[str, Any], where: str, build: InstanceBuilder) -> dict[str, Any]:
    hints, arguments = get_type_hints(cls), {}
    fields = [field.name for field in dataclasses.fields(cls) if field.init]
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"unknown field '{where}{key}'; {suggest_nearest(str(key), fields)}")
        arguments[key] = _convert(hints[key], value, f"{where}{key}", build)
    return arguments


def variants_with_field(known: Mapping[str, type[Any]], field: str) -> list[str]:
    """Names of the variants that have a field."""
    return [name for name, option in known.items() if field in option.__dataclass_fields__]


def _select_variant(known: Mapping[str, type[Any]], values: Mapping[str, Any], where: str) -> type[Any]:
    """The variant that a section names; raises ConfigError for a field that only others have."""
    name = values.get("name", next(iter(known)))
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"{where}.name is {name!r}; {suggest_nearest(str(name), list(known))}")
    fields = known[name].__dataclass_fields__
    for key in values:
        if key not in fields:
            hint = suggest_nearest(str(key), list(fields))
            if others := variants_with_field(known, str(key)):
                hint = f"expected it with {', '.join(others)} alone; leave it out"
            raise ConfigError(f"unknown field '{where}.{key}' for the {where.split('.')[-1]} {name}; {hint}")
    return known[name]


def _convert(hint: Any, value: Any, where: str, build: InstanceBuilder) -> Any:
    origin, options = get_origin(hint), get_args(hint)
    known, optional = variants_by_name(hint), optional_section_type(hint)
    if dataclasses.is_dataclass(hint) or known or (optional and value is not None):
        if isinstance(value, tuple(known.values()) or optional or hint):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {value!r}; expected a section of fields")
        cls = _select_variant(known, value, where) if known else optional or hint
        return build(cls, value, f"{where}.")
    if origin in (Union, types.UnionType):
        for exact in (True, False):  # `3` for `int | float` stays an int; `1e-4` becomes a float only when nothing fits
            for option in options:
                if exact and type(value) is not option and get_origin(option) is None:
                    continue
                try:
                    return _convert(option, value, where, build)
                except ConfigError:
                    continue
        raise _type_error(hint, value, where)
    if origin is Literal:
        value = "no" if value is False and "no" in options else value
        if value not in options or type(value) not in {type(option) for option in options}:
            raise ConfigError(
                f"{where} is {value!r}; {suggest_nearest(str(value), [str(option) for option in options])}"
            )
        return value
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise _type_error(hint, value, where)
        inner = options if origin is tuple and options[-1] is not Ellipsis else (options[0],) * len(value)
        if len(inner) != len(value):
            raise _type_error(hint, value, where)
        pairs = enumerate(zip(inner, value, strict=True))
        return origin(_convert(option, item, f"{where}[{i}]", build) for i, (option, item) in pairs)
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise _type_error(hint, value, where) from None
    if hint is Path and isinstance(value, str):
        return Path(value).expanduser()
    if hint in (None, type(None)):
        if value is not None:
            raise _type_error(hint, value, where)
        return None
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _type_error(hint, value, where)
    return value


def _type_error(hint: Any, value: Any, where: str) -> ConfigError:
    name = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    return ConfigError(f"{where} is {value!r}; expected {name.replace('NoneType', 'none').replace('None', 'none')}")


def to_mapping(config: Any) -> dict[str, Any]:
    """The plain values of a dataclass, as YAML and JSON hold them."""
    return {field.name: _to_plain_value(getattr(config, field.name)) for field in dataclasses.fields(config)}


def to_stored_mapping(config: Any) -> dict[str, Any]:
    """`to_mapping` with the number of the format, as a file holds it, of a dataclass that has a `migration`."""
    values = to_mapping(config)
    migration: Migration | None = getattr(config, "migration", None)
    return values if migration is None else migration.add_format_number(values)


def non_default_values(config: Any, besides: Collection[str]) -> dict[str, Any]:
    """The plain values of a dataclass that are not the fields' defaults, without the fields named in `besides`."""
    found = {}
    for field in dataclasses.fields(config):
        factory, value = field.default_factory, getattr(config, field.name)
        default = field.default if factory is dataclasses.MISSING else factory()
        if field.name not in besides and value != default:
            found[field.name] = _to_plain_value(value)
    return found


def _to_plain_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, list | tuple):
        return [_to_plain_value(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def flatten(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested values by their whole names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flatten(value, f"{where}{name}.") if isinstance(value, Mapping) else {where + name: value}
    return found


def find_differences(held: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "") -> dict[str, tuple[Any, Any]]:
    """Fields by their whole names whose values are not the same: what is held and what is wanted."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in {**held, **wanted}:
        old, new = held.get(name), wanted.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= find_differences(old, new, f"{where}{name}.")
        elif old != new:
            found[where + name] = (old, new)
    return found


def write_yaml(path: Path, config: Any) -> None:
    # Not allow_unicode: what is written raw, such as U+0085, does not always come back.
    write_text(path, yaml.safe_dump(to_stored_mapping(config), sort_keys=False))
