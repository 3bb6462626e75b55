"""Checks of options that several priors share."""

from typing import Any

from training_harness.errors import ConfigError


def check_sizes(options: Any, names: tuple[str, ...]) -> None:
    """Raise ConfigError for the first of the named options that is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise ConfigError(f"model.{name} is {getattr(options, name)}; expected a whole number of at least 1")


def check_share(value: float, name: str) -> None:
    """Raise ConfigError for a value outside [0, 1]."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is {value}; expected a share in [0, 1], such as 0.1")
