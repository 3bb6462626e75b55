"""Checks of option values that several commands share; each raises UserError with what was expected."""

import math
from pathlib import Path

from training_harness.errors import ConfigError, UserError
from training_harness.files import holds_files


def check_count(option: str, count: int) -> None:
    if count < 1:
        raise UserError(f"{option} is {count}; expected at least 1")


def check_dry_run(dry_run: bool, minutes: float | None) -> None:
    if dry_run and minutes is not None:
        raise UserError(
            "--dry-run was given with --minutes, by which a run sets its steps when it begins; expected one of them; give "
            "--max-steps with --dry-run"
        )


def check_apart(output: Path, data: str) -> None:
    if Path(data).resolve() in output.resolve().parents:
        raise UserError(
            f"--output is {output}, inside --data {data}, where what is written would be taken for images; expected a folder "
            "elsewhere"
        )


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}; expected a whole number from 0 to 2^63 − 1")


def check_page(path: Path, name: str) -> None:
    """Refuses what cannot be an HTML file; `name` is that of the page in a folder."""
    if path.is_dir() or path.suffix != ".html":
        such = path / name if path.is_dir() else path.with_suffix(".html")
        raise UserError(f"--output is {path}; expected a .html file, such as {such}")


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuses a folder with files in it, unless they may be written over."""
    if holds_files(folder) and not overwrite:
        raise UserError(f"{folder} holds files already; choose another --output, or give --overwrite")


def check_minutes(minutes: float | None) -> None:
    if minutes is not None and not 0 < minutes < math.inf:
        raise ConfigError(f"--minutes is {minutes:g}; expected a positive number")
