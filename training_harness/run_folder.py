"""Whether a configuration may go on in a run folder, begin in it, or must look for another one."""

from pathlib import Path
from typing import Any

from training_harness.checkpoints import checkpoint_path, newest_step
from training_harness.configuration import differences, read_yaml, to_mapping
from training_harness.errors import UserError
from training_harness.files import up_to_date
from training_harness.run import RunConfig

# What may differ between a run folder and the command that goes on with it.
CHANGEABLE = (
    *("output", "max_steps", "log_every", "sample_every", "checkpoint_every", "keep_checkpoints", "resume"),
    *("compile", "gradient_checkpointing", "report_to", "ema.device"),
)


def held_configuration(folder: Path) -> dict[str, Any] | None:
    """What the run in a folder was begun with; none where no run is, whatever else may be there."""
    try:
        held = read_yaml(folder / "config.yaml")
    except (UserError, OSError):
        return None
    return held if {"output", "max_steps", "batch_size", "seed"} <= held.keys() else None


def check_folder(config: RunConfig, kind: str) -> int | None:
    """Whether `config` may write to its folder: refuses one that holds another configuration.

    Returns the steps of the run that is there, when it is finished and `config` asks for no more; else None.
    Refuses fewer steps than an unfinished run has done.
    """
    held = held_configuration(config.output)
    if held is None:
        if config.output.exists() and any(config.output.iterdir()):
            raise UserError(
                f"{config.output} is not empty and holds no {kind} run; expected a new or empty folder; choose another --output"
            )
        return None
    if not (newest_step(config.output) or (config.output / "model").exists()):
        return None  # nothing was saved that another configuration could not go on with
    wanted = to_mapping(config)
    differing = [
        f"{name} is {old!r} there and {new!r} here"
        for name, (old, new) in differences(held, wanted).items()
        if name not in CHANGEABLE
    ]
    if differing:
        raise UserError(
            f"{config.output} holds a run with another configuration ({'; '.join(differing[:4])}); "
            "expected the same; give the same values to go on with it, or choose another --output"
        )
    if config.resume != "latest":
        return None
    done = newest_step(config.output)
    checkpoint = checkpoint_path(config.output, done) / "state.pt"
    if done >= config.max_steps and up_to_date(config.output / "model" / "config.json", made_from=checkpoint):
        return done  # a model older than its checkpoint is that of the run before it was extended
    if done > config.max_steps:
        raise UserError(
            f"{config.output} holds an unfinished run that has done {done} steps and --max-steps is {config.max_steps}; "
            f"expected at least {done}, to finish it"
        )
    return None
