"""Experiment trackers in addition to metrics.jsonl: TensorBoard, Weights & Biases and trackio, through Accelerate.

runs/NAME/tensorboard/   view with `tensorboard --logdir runs`
wandb, trackio           project latentloom, run name = folder name; a resumed run continues the same tracker run
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import Accelerator
from PIL import Image

from training_harness.configuration import flatten
from training_harness.errors import UserError

TrackerName = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "latentloom"


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raise UserError if the package of a tracker is not installed; Accelerate would ignore the tracker."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f'--report-to names {name}, which is not installed; expected its package; run pip install "latentloom[track]"'
            )


def start_trackers(accelerator: Accelerator, folder: Path, run_id: str, configuration: Mapping[str, Any]) -> None:
    """Start a run in each tracker, or resume the run with the id `run_id`."""
    shared_options = {"name": folder.resolve().name, "resume": "allow"}
    options = {
        "wandb": shared_options | {"id": run_id, "dir": str(folder)},
        "trackio": shared_options | {"embed": False},
    }
    plain = {name: v if isinstance(v, int | float | str) else str(v) for name, v in flatten(configuration).items()}
    accelerator.init_trackers(PROJECT, plain, options)


def log_metrics(accelerator: Accelerator, metrics: Mapping[str, float], step: int) -> None:
    """Send metrics to all trackers."""
    for tracker in accelerator.trackers:
        if (
            tracker.name == "trackio" and accelerator.is_main_process
        ):  # older versions of Accelerate do not pass the step on
            tracker.tracker.log(dict(metrics), step=step)
        else:
            tracker.log(dict(metrics), step=step)


def log_image(accelerator: Accelerator, path: Path, step: int) -> None:
    """Send a saved image to all trackers."""
    image = np.asarray(Image.open(path).convert("RGB"))[None]
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": image}, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"samples": image}, step)
        else:
            import trackio

            tracker.tracker.log({"samples": trackio.Image(path)}, step=step)
