"""`run.json`: metadata of a run that is not part of its configuration.

trained_on       fingerprint of the images or codes
finished_step    the step for which the model and all other outputs were written
"""

import json
from pathlib import Path
from typing import Any

from training_harness.checkpoints import checkpoint_path, newest_step
from training_harness.files import is_up_to_date, write_json

RUN_METADATA_FILE = "run.json"


def read_run_metadata(folder: Path) -> dict[str, Any]:
    """Read `run.json`; empty for runs of earlier versions, which have no such file."""
    path = folder / RUN_METADATA_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def update_run_metadata(folder: Path, **values: Any) -> None:
    """Add or replace values in `run.json`."""
    write_json(folder / RUN_METADATA_FILE, read_run_metadata(folder) | values)


def mark_finished(folder: Path) -> None:
    """Record that all outputs of the newest checkpoint were written."""
    update_run_metadata(folder, finished_step=newest_step(folder))


def finished_step(folder: Path) -> int:
    """Return the step for which all outputs were written, or 0 if outputs are missing.

    Runs of earlier versions do not record it. Their model belongs to the newest checkpoint if it is not older than it.
    """
    if not (folder / "model" / "config.json").exists():
        return 0
    if (recorded := read_run_metadata(folder).get("finished_step")) is not None:
        return int(recorded)
    step = newest_step(folder)
    checkpoint = checkpoint_path(folder, step) / "state.pt"
    return step if is_up_to_date(folder / "model" / "config.json", source=checkpoint) else 0
