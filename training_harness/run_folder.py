"""Whether a configuration may continue the run in a folder, begin one there, or must look for another folder.

A run is known by its configuration and by the fingerprint of what it is trained on, not by paths: a run, its images and its codes
may be moved, renamed or named in another way.
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

# What may differ between a run folder and the command that goes on with it.
CHANGEABLE_FIELDS = (
    *("output", "max_steps", "log_every", "sample_every", "checkpoint_every", "keep_checkpoints", "resume"),
    *("compile", "gradient_checkpointing", "report_to", "ema.device"),
)
PATH_FIELDS = ("data", "codes")  # fields that name what a run is trained on


def stored_configuration(folder: Path, migration: Migration) -> dict[str, Any] | None:
    """The configuration that the run in a folder was begun with, in the present format.

    None where there is no run, whatever else may be there.
    """
    try:
        held = read_yaml(folder / "config.yaml")
    except (UserError, OSError):
        return None
    held = migration.migrate(held)
    return held if {"output", "max_steps", "batch_size", "seed"} <= held.keys() else None


def check_run_folder(config: RunConfig, kind: str, trained_on: str = "") -> int | None:
    """Refuses a folder that `config` may not write to.

    Args:
        trained_on: fingerprint of the images or codes.
    Returns:
        The steps of the run that is there, when it is finished and `config` asks for no more; else none.
    Raises:
        UserError when the folder holds something else, a run with another configuration or other images, or an unfinished run
        that has done more steps than `config` asks for.
    """
    folder = config.output
    held = stored_configuration(folder, config.migration)
    if held is None:
        if holds_files(folder):
            raise UserError(
                f"{folder} is not empty and holds no {kind} run; expected a new or empty folder; choose another --output"
            )
        return None
    if not (newest_step(folder) or (folder / "model").exists()):
        return None  # nothing was saved that another configuration could not go on with
    with suppress(ConfigError):  # a run of another kind, which then differs
        held = fill_defaults(type(config), held)
    different = {
        name: values
        for name, values in find_differences(held, to_mapping(config)).items()
        if name not in CHANGEABLE_FIELDS
    }
    for name in PATH_FIELDS:
        if name in different and _name_same_data(folder, *different[name], trained_on):
            del different[name]
    if different:
        listed = [f"{name} is {old!r} there and {new!r} here" for name, (old, new) in different.items()]
        raise UserError(
            f"{folder} holds a run with another configuration ({'; '.join(listed[:4])}); "
            "expected the same; give the same values to go on with it, or choose another --output"
        )
    stored = read_run_metadata(folder).get("trained_on")
    if stored and trained_on and stored != trained_on:
        what = (
            "codes: of another tokenizer or other images"
            if kind == "prior"
            else "images: some were added, removed or changed"
        )
        raise UserError(f"{folder} holds a run on other {what}; expected the same; choose another --output")
    if config.resume != "latest":
        return None
    done = newest_step(folder)
    if done >= config.max_steps and finished_step(folder) == done:
        return done
    if done > config.max_steps:
        raise UserError(
            f"{folder} holds an unfinished run that has done {done} steps and --max-steps is {config.max_steps}; "
            f"expected at least {done}, to finish it"
        )
    return None


def _name_same_data(folder: Path, old: Any, new: Any, trained_on: str) -> bool:
    """Whether two paths name the same images or codes: by the fingerprint, or for runs without one by where they lead.

    A run of an earlier version has none. Its codes are compared by their tokenizer's id when the checkpoint is loaded.
    """
    if not (isinstance(old, str) and isinstance(new, str)):
        return False
    if stored := read_run_metadata(folder).get("trained_on"):
        return stored == trained_on
    there, here = (Path(path).expanduser() for path in (old, new))
    return there.resolve() == here.resolve() or (not there.exists() and there.name == here.name)
