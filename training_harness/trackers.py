"""Experiment trackers beside metrics.jsonl: TensorBoard, Weights & Biases and trackio, through Accelerate's own.

runs/NAME/tensorboard/   `tensorboard --logdir runs` shows it
wandb, trackio           project latentloom, a run named after the folder; a run that goes on, goes on there too
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
    """Raises UserError for a tracker whose package is not installed: Accelerate would go on without it."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f'--report-to names {name}, which is not installed; expected its package; pip install "latentloom[track]"'
            )


def start_trackers(accelerator: Accelerator, folder: Path, run_id: str, configuration: Mapping[str, Any]) -> None:
    """Begins a run with each tracker, or goes on with the one of `run_id`."""
    named = {"name": folder.resolve().name, "resume": "allow"}
    options = {"wandb": named | {"id": run_id, "dir": str(folder)}, "trackio": named | {"embed": False}}
    plain = {name: v if isinstance(v, int | float | str) else str(v) for name, v in flatten(configuration).items()}
    accelerator.init_trackers(PROJECT, plain, options)


def log_metrics(accelerator: Accelerator, figures: Mapping[str, float], step: int) -> None:
    for tracker in accelerator.trackers:
        if tracker.name == "trackio" and accelerator.is_main_process:  # older Accelerate keeps the step from it
            tracker.tracker.log(dict(figures), step=step)
        else:
            tracker.log(dict(figures), step=step)


def log_image(accelerator: Accelerator, path: Path, step: int) -> None:
    """Hands a saved picture to the trackers that take pictures."""
    picture = np.asarray(Image.open(path).convert("RGB"))[None]
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": picture}, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"samples": picture}, step)
        else:
            import trackio

            tracker.tracker.log({"samples": trackio.Image(path)}, step=step)
