"""Checks of option values that several commands share. Each raises UserError with the value that was expected."""

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
            "--dry-run was given with --minutes, which sets the steps only when a run begins; expected one of them; give "
            "--max-steps with --dry-run"
        )


def check_output_outside_data(output: Path, data: str) -> None:
    if Path(data).resolve() in output.resolve().parents:
        raise UserError(
            f"--output is {output}, inside --data {data}, so its files would be read as images; expected a folder elsewhere"
        )


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}; expected a whole number from 0 to 2^63 − 1")


def check_html_output(path: Path, default_name: str) -> None:
    """Check that `path` can be an HTML file. The message suggests `default_name` in place of a folder."""
    if path.is_dir() or path.suffix != ".html":
        example = path / default_name if path.is_dir() else path.with_suffix(".html")
        raise UserError(f"--output is {path}; expected a .html file, such as {example}")


def check_output_folder(folder: Path, overwrite: bool) -> None:
    """Check that the folder is empty, unless its files may be overwritten."""
    if holds_files(folder) and not overwrite:
        raise UserError(f"{folder} holds files already; choose another --output, or give --overwrite")


def check_minutes(minutes: float | None) -> None:
    if minutes is not None and not 0 < minutes < math.inf:
        raise ConfigError(f"--minutes is {minutes:g}; expected a positive number")
