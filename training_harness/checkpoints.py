"""Checkpoints: the files from which an interrupted run resumes.

    checkpoints/step_000500/state.pt           tensors and plain values, loaded with weights_only
    checkpoints/step_000500/checkpoint.json    step, and bytes and sha256 of state.pt

Each checkpoint folder is written atomically. Loading compares length and sha256, so a corrupt file is detected.
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
    """A checkpoint is unreadable, or differs from its description."""


def checkpoint_path(run_folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return run_folder / "checkpoints" / f"step_{step:06d}"


def write_checkpoint(run_folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Raises:
        UserError: The disk is full or the folder is not writable. Earlier checkpoints are unchanged.
    """
    try:
        with atomic_folder(checkpoint_path(run_folder, step)) as folder:
            torch.save(state, folder / STATE_FILE)
            size, sha256 = (folder / STATE_FILE).stat().st_size, compute_sha256(folder / STATE_FILE)
            write_json(folder / DESCRIPTION_FILE, {"step": step, "bytes": size, "sha256": sha256})
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        newest = newest_step(run_folder)
        newest_text = f"the newest complete one is of step {newest}" if newest else "there is no complete one yet"
        raise UserError(
            f"the checkpoint of step {step} could not be saved in {run_folder} ({_short_reason(error)}); {newest_text}; "
            "free some disk space and run the same command again"
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load the state of a checkpoint on the CPU.

    Raises:
        CorruptCheckpointError: A file is missing or unreadable, or `state.pt` has another size or sha256 than described.
    """
    try:
        description = json.loads((path / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        actual = {"bytes": (path / STATE_FILE).stat().st_size, "sha256": compute_sha256(path / STATE_FILE)}
        for name, value in actual.items():
            if description[name] != value:
                raise CorruptCheckpointError(f"{path / STATE_FILE} has {name} {value}; expected {description[name]}")
        return torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"{path} cannot be read ({_short_reason(error)})") from error


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Return the checkpoint folders of a run in the order of their steps."""
    paths = (path for path in (run_folder / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", path.name))
    return sorted(paths, key=checkpoint_step)  # by number: the name step_1000000 sorts before step_999999


def newest_step(run_folder: Path) -> int:
    """Return the step of the newest checkpoint, or 0 if there is none."""
    return max(map(checkpoint_step, list_checkpoints(run_folder)), default=0)


def checkpoint_step(checkpoint: Path) -> int:
    """Return the step of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("step_"))


def prune_checkpoints(run_folder: Path, step: int, newest: int, best: int | None) -> None:
    """Delete all checkpoints except the `newest` ones up to `step` and the best one.

    Checkpoints of later steps are deleted too: the run was resumed from an earlier step.

    Args:
        run_folder: Folder of the run.
        step: Current step.
        newest: Number of checkpoints to keep.
        best: Step of the best checkpoint, which is kept as well.
    """
    checkpoints = list_checkpoints(run_folder)
    newest_checkpoints = [path for path in checkpoints if checkpoint_step(path) <= step][-newest:]
    for path in checkpoints:
        if path not in newest_checkpoints and checkpoint_step(path) != best:
            shutil.rmtree(path)


def _short_reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:120]
