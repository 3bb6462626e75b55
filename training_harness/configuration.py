"""Typed dataclasses as configuration: a strict loader from YAML mappings, and the way back.

Each value is checked against its field's type. Three conversions are made, since YAML asks for them: an int where a float
is expected, a string such as `1e-4`, which YAML 1.1 does not read as a number, and false where the choice is `no`, which
it reads as a truth value. A key that no field has is an error that suggests the nearest one.
"""

import dataclasses
import difflib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from training_harness.errors import ConfigError
from training_harness.files import write_text

Config = TypeVar("Config")


def nearest(name: str, choices: list[str]) -> str:
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


def merged(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `overlay` in place of its own, section by section."""
    result = dict(base)
    for key, value in overlay.items():
        under = result.get(key)
        result[key] = merged(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return result


def from_mapping(cls: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """An instance of the dataclass `cls` from a mapping; raises ConfigError at the first key or value that does not fit."""
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"unknown field '{where}{key}'; {nearest(str(key), list(fields))}")
        arguments[key] = _converted(hints[key], value, f"{where}{key}")
    missing = [
        name
        for name, field in fields.items()
        if name not in arguments
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing field '{where}{missing[0]}'; expected a value of type {hints[missing[0]]}")
    return cls(**arguments)


def _converted(hint: Any, value: Any, where: str) -> Any:
    origin, options = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {value!r}; expected a section of fields")
        return from_mapping(hint, value, f"{where}.")  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        for exact in (True, False):  # `3` for `int | float` stays an int; `1e-4` becomes a float only when nothing fits
            for option in options:
                if exact and type(value) is not option and get_origin(option) is None:
                    continue
                try:
                    return _converted(option, value, where)
                except ConfigError:
                    continue
        raise _mismatch(hint, value, where)
    if origin is Literal:
        value = "no" if value is False and "no" in options else value
        if value not in options or type(value) not in {type(option) for option in options}:
            raise ConfigError(f"{where} is {value!r}; {nearest(str(value), [str(option) for option in options])}")
        return value
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise _mismatch(hint, value, where)
        inner = options if origin is tuple and options[-1] is not Ellipsis else (options[0],) * len(value)
        if len(inner) != len(value):
            raise _mismatch(hint, value, where)
        return origin(_converted(option, item, f"{where}[{i}]") for i, (option, item) in enumerate(zip(inner, value)))  # noqa: B905
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise _mismatch(hint, value, where) from None
    if hint is Path and isinstance(value, str):
        return Path(value).expanduser()
    if hint in (None, type(None)):
        if value is not None:
            raise _mismatch(hint, value, where)
        return None
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _mismatch(hint, value, where)
    return value


def _mismatch(hint: Any, value: Any, where: str) -> ConfigError:
    name = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    return ConfigError(f"{where} is {value!r}; expected {name.replace('NoneType', 'none').replace('None', 'none')}")


def to_mapping(config: Any) -> dict[str, Any]:
    """The plain values of a dataclass, as YAML and JSON hold them."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def flat(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested values by their whole names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{where}{name}.") if isinstance(value, Mapping) else {where + name: value}
    return found


def differences(held: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "") -> dict[str, tuple[Any, Any]]:
    """Fields by their whole names whose values are not the same: what is held and what is wanted."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in {**held, **wanted}:
        old, new = held.get(name), wanted.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= differences(old, new, f"{where}{name}.")
        elif old != new:
            found[where + name] = (old, new)
    return found


def write_yaml(path: Path, config: Any) -> None:
    # Not allow_unicode: what is written raw, such as U+0085, does not always come back.
    write_text(path, yaml.safe_dump(to_mapping(config), sort_keys=False))
