"""Checkpoints: what an interrupted run goes on from.

    checkpoints/step_000500/state.pt           tensors and plain values, loaded with weights_only
    checkpoints/step_000500/checkpoint.json    step, and bytes and sha256 of state.pt

A checkpoint appears whole or not at all, and what is loaded is what was written: another length or sha256 is a torn one.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from training_harness.errors import UserError
from training_harness.files import atomic_folder, compute_sha256, write_json

STATE_FILE, DESCRIPTION_FILE = "state.pt", "checkpoint.json"


class CorruptCheckpointError(UserError):
    """A checkpoint that is not what was written."""


def checkpoint_path(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step_{step:06d}"


def write_checkpoint(run_folder: Path, step: int, state: dict[str, Any]) -> None:
    """Raises UserError when there is no room, or the folder may not be written; earlier checkpoints stay."""
    try:
        with atomic_folder(checkpoint_path(run_folder, step)) as folder:
            torch.save(state, folder / STATE_FILE)
            found = {
                "step": step,
                "bytes": (folder / STATE_FILE).stat().st_size,
                "sha256": compute_sha256(folder / STATE_FILE),
            }
            write_json(folder / DESCRIPTION_FILE, found)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        held = newest_step(run_folder)
        left = f"the newest whole one is of step {held}" if held else "there is none yet"
        raise UserError(
            f"the checkpoint of step {step} could not be saved in {run_folder} ({_short_reason(error)}); {left}; "
            "make room there and run the same command again"
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state that was written. Raises TornCheckpointError."""
    try:
        described = json.loads((path / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        held = {"bytes": (path / STATE_FILE).stat().st_size, "sha256": compute_sha256(path / STATE_FILE)}
        for name, value in held.items():
            if described[name] != value:
                raise CorruptCheckpointError(f"{path / STATE_FILE} has {name} {value}; expected {described[name]}")
        return torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"{path} cannot be read ({_short_reason(error)})") from error


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints of a run by their step: names alone would put step_1000000 before step_999999."""
    found = (path for path in (run_folder / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", path.name))
    return sorted(found, key=checkpoint_step)


def newest_step(run_folder: Path) -> int:
    """Step of the newest checkpoint; 0 without one."""
    return max(map(checkpoint_step, list_checkpoints(run_folder)), default=0)


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def prune_checkpoints(run_folder: Path, step: int, newest: int, best: int | None) -> None:
    """Keeps the checkpoint of `step`, the newest ones up to it, `newest` in all, and that of step `best`.

    Those of later steps belong to a run that was taken up again before them.
    """
    held = list_checkpoints(run_folder)
    kept = [path for path in held if checkpoint_step(path) <= step][-newest:]
    for path in held:
        if path not in kept and checkpoint_step(path) != best:
            shutil.rmtree(path)


def _short_reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:120]
