"""`run.json`: what a run folder knows of itself beside its configuration.

trained_on       fingerprint of its images or codes
finished_step    the step whose model, and whatever follows from it, was written as a whole
"""

import json
from pathlib import Path
from typing import Any

from training_harness.checkpoints import checkpoint_path, newest_step
from training_harness.files import is_up_to_date, write_json

RUN_METADATA_FILE = "run.json"


def read_run_metadata(folder: Path) -> dict[str, Any]:
    """Empty for runs of versions that had no such file."""
    path = folder / RUN_METADATA_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def update_run_metadata(folder: Path, **facts: Any) -> None:
    write_json(folder / RUN_METADATA_FILE, read_run_metadata(folder) | facts)


def mark_finished(folder: Path) -> None:
    """Notes that everything was written that follows from the newest checkpoint."""
    update_run_metadata(folder, finished_step=newest_step(folder))


def finished_step(folder: Path) -> int:
    """The step for which everything was written; 0 while something is missing.

    In a run without that note, the model is the newest checkpoint's when it was written after it.
    """
    if not (folder / "model" / "config.json").exists():
        return 0
    if (noted := read_run_metadata(folder).get("finished_step")) is not None:
        return int(noted)
    step = newest_step(folder)
    checkpoint = checkpoint_path(folder, step) / "state.pt"
    return step if is_up_to_date(folder / "model" / "config.json", made_from=checkpoint) else 0
