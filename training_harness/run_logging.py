"""Logging of a run: rows of `metrics.jsonl`, a progress bar, warnings, sample images and trackers."""

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.std import tqdm

from training_harness.metric_log import MetricLog
from training_harness.progress import progress_bar
from training_harness.run_config import RunConfig
from training_harness.trackers import log_image, log_metrics

PROGRESS_BAR_TERMS = 3  # number of loss terms in the progress bar


class RunLogging:
    """The part of a `Run` that logs."""

    config: RunConfig
    accelerator: Accelerator
    folder: Path
    log_file: MetricLog

    def __init__(self) -> None:
        self.gradient_norms: dict[str, float] = {}
        """Gradient norms of the last step by the name of the optimizer; "" is the main one."""
        self._bar: tqdm | None = None
        self._started, self._first_step, self._images_per_step = 0.0, 0, 0

    def start_progress(self, step: int, images_per_step: int, description: str) -> tqdm:
        """Create a progress bar in images that starts at `step`."""
        self._started, self._first_step, self._images_per_step = time.perf_counter(), step, images_per_step
        self._bar = progress_bar(
            total=self.config.max_steps * images_per_step,
            initial=step * images_per_step,
            desc=description,
            unit="image",
            unit_scale=True,
            disable=None if self.accelerator.is_main_process else True,
        )
        return self._bar

    def is_due(self, step: int, every: int) -> bool:
        """Return whether something that happens every `every` steps is due; everything is due at the last step."""
        return step % every == 0 or step == self.config.max_steps

    def log(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Average the values over the processes and log them as one row, every `log_every` steps."""
        if not self.is_due(step, self.config.log_every):
            return
        numbers = torch.tensor(
            [float(torch.as_tensor(v).detach()) for v in values.values()], device=self.accelerator.device
        )
        numbers = self.accelerator.reduce(numbers, reduction="mean")
        row = dict(zip(values, numbers.tolist(), strict=True))
        for name, norm in self.gradient_norms.items():
            if math.isfinite(norm):
                row[f"{name}_gradient_norm" if name else "gradient_norm"] = norm
        images = (step - self._first_step) * self._images_per_step
        rate = images / (time.perf_counter() - self._started) if self._started else 0.0
        self.log_row(step, row | {"images_per_second": rate})
        if self._bar is not None:
            bar_terms = {name: f"{value:.3g}" for name, value in list(row.items())[:PROGRESS_BAR_TERMS]}
            self._bar.set_postfix({"step": step} | bar_terms, refresh=False)

    def log_row(self, step: int, row: Mapping[str, float]) -> None:
        """Log metrics that are equal on all processes."""
        rounded = {name: float(f"{value:.6g}") for name, value in row.items()}
        if self.accelerator.is_main_process:
            self.log_file.append({"step": step} | rounded)
        log_metrics(self.accelerator, rounded, step)

    def warn(self, step: int, about: str, text: str) -> None:
        """Print a warning and add it to the log; `about` names its subject."""
        if self.accelerator.is_main_process:
            self.log_file.append({"step": step, "warning": text, "about": about})
            tqdm.write(f"warning at step {step}: {text}", file=sys.stderr)

    def samples_path(self, step: int) -> Path:
        """Return the path of the samples of a step."""
        return self.folder / "samples" / f"step_{step:06d}.png"

    def log_samples(self, step: int) -> None:
        """Send the samples of a step to the trackers."""
        if self.accelerator.is_main_process and self.config.report_to:
            log_image(self.accelerator, self.samples_path(step), step)
