"""Check whether a configuration may resume the run in a folder or start a new run there.

A run is identified by its configuration and by the fingerprint of its images or codes, not by paths. The run, its images and its
codes may be moved or renamed.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from training_harness.checkpoints import newest_step
from training_harness.configuration import fill_defaults, find_differences, read_yaml, to_mapping
from training_harness.errors import ConfigError, UserError
from training_harness.files import holds_files
from training_harness.migration import Migration
from training_harness.run_config import RunConfig
from training_harness.run_metadata import finished_step, read_run_metadata

# Fields that may differ between a run and the command that resumes it.
CHANGEABLE_FIELDS = (
    *("output", "max_steps", "log_every", "sample_every", "checkpoint_every", "keep_checkpoints", "resume"),
    *("compile", "gradient_checkpointing", "report_to", "ema.device"),
)
PATH_FIELDS = ("data", "codes")  # fields with the path of the training data


def stored_configuration(folder: Path, migration: Migration) -> dict[str, Any] | None:
    """Read the configuration of the run in a folder, in the current format; None if the folder contains no run."""
    try:
        stored = read_yaml(folder / "config.yaml")
    except (UserError, OSError):
        return None
    stored = migration.migrate(stored)
    return stored if {"output", "max_steps", "batch_size", "seed"} <= stored.keys() else None


def check_run_folder(config: RunConfig, kind: str, trained_on: str = "") -> int | None:
    """Check that `config` may write to its output folder.

    Args:
        config: Configuration of the run.
        kind: "tokenizer" or "prior", for error messages.
        trained_on: Fingerprint of the images or codes.

    Returns:
        The number of steps of the run in the folder if it is finished and `config` requires no more steps, else None.

    Raises:
        UserError: The folder contains other files, a run with another configuration or other data, or an unfinished run
            that has more steps than `config` requires.
    """
    folder = config.output
    stored = stored_configuration(folder, config.migration)
    if stored is None:
        if holds_files(folder):
            raise UserError(
                f"{folder} is not empty and contains no {kind} run; expected a new or empty folder; choose another --output"
            )
        return None
    if not (newest_step(folder) or (folder / "model").exists()):
        return None  # nothing was saved, so any configuration may start here
    with suppress(ConfigError):  # a run of another kind: the comparison below reports it
        stored = fill_defaults(type(config), stored)
    changed = {
        name: values
        for name, values in find_differences(stored, to_mapping(config)).items()
        if name not in CHANGEABLE_FIELDS
    }
    for name in PATH_FIELDS:
        if name in changed and _name_same_data(folder, *changed[name], trained_on):
            del changed[name]
    if changed:
        listed = [f"{name} is {old!r} in the run and {new!r} in this command" for name, (old, new) in changed.items()]
        raise UserError(
            f"{folder} contains a run with another configuration ({'; '.join(listed[:4])}); "
            "expected the same; pass the same values to resume it, or choose another --output"
        )
    fingerprint = read_run_metadata(folder).get("trained_on")
    if fingerprint and trained_on and fingerprint != trained_on:
        data = (
            "codes (of another tokenizer or other images)"
            if kind == "prior"
            else "images (some were added, removed or changed)"
        )
        raise UserError(f"{folder} contains a run on other {data}; expected the same; choose another --output")
    if config.resume != "latest":
        return None
    steps = newest_step(folder)
    if steps >= config.max_steps and finished_step(folder) == steps:
        return steps
    if steps > config.max_steps:
        raise UserError(
            f"{folder} contains an unfinished run with {steps} steps and --max-steps is {config.max_steps}; "
            f"expected at least {steps}; pass --max-steps {steps} or more to finish it"
        )
    return None


def _name_same_data(folder: Path, old: Any, new: Any, trained_on: str) -> bool:
    """Return whether two paths name the same images or codes.

    Fingerprints are compared if the run has one. Runs of earlier versions have none: then the paths are compared, and codes
    also by the id of their tokenizer when the checkpoint is loaded.
    """
    if not (isinstance(old, str) and isinstance(new, str)):
        return False
    if fingerprint := read_run_metadata(folder).get("trained_on"):
        return fingerprint == trained_on
    old_path, new_path = (Path(path).expanduser() for path in (old, new))
    was_moved = not old_path.exists() and old_path.name == new_path.name
    return old_path.resolve() == new_path.resolve() or was_moved
