"""A training run: its folder, its processes and its steps.

    runs/NAME/config.yaml   environment.json   metrics.jsonl   samples/   checkpoints/step_000500/   model/

A step is an optimizer step; steps count from 1. The random numbers of a step depend on (seed, step, process) alone, so a
checkpoint stores no generator state.
"""

import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from torch import Tensor, nn

from training_harness.allocator import keep_freed_memory
from training_harness.checkpoints import newest_step
from training_harness.configuration import to_mapping, write_yaml
from training_harness.errors import UserError
from training_harness.guard import NonFiniteGuard, find_first_non_finite
from training_harness.matmul_precision import reduced_matmul_precision
from training_harness.metric_log import MetricLog
from training_harness.processes import accelerated_device
from training_harness.provenance import record_environment
from training_harness.run_checkpointing import RunCheckpointing
from training_harness.run_config import RunConfig
from training_harness.run_logging import RunLogging
from training_harness.run_metadata import update_run_metadata
from training_harness.sharding import gather_tensors
from training_harness.signals import Interrupted, StopRequest, stop_on_signal
from training_harness.trackers import check_trackers, start_trackers


class Run(RunLogging, RunCheckpointing):
    """A training run that logs, saves checkpoints and resumes."""

    def __init__(self, config: RunConfig, trained_on: str = "") -> None:
        """Start a run, or resume the run in the output folder.

        Args:
            config: Configuration of the run.
            trained_on: Fingerprint of the images or codes. It identifies the data when folders were moved or renamed.
        """
        RunLogging.__init__(self)
        RunCheckpointing.__init__(self)
        self.config, self.folder = config, config.output
        keep_freed_memory()
        check_trackers(config.report_to)
        check_launcher_precision(config)
        accelerated_device()  # joins the other processes
        AcceleratorState._reset_state()  # allows another precision for a second run in one process
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.accumulation_steps,
            step_scheduler_with_optimizer=False,
            dynamo_backend="inductor" if config.compile else None,
            log_with=list(config.report_to) or None,
            project_config=ProjectConfiguration(logging_dir=str(self.folder / "tensorboard")),
        )
        self.log_file = MetricLog(self.folder / "metrics.jsonl")
        self.source_ids: Callable[[int], list[str]] = lambda step: []
        """Returns the source ids of the examples of a step on this process; the training loop sets it."""
        self.accelerator.wait_for_everyone()  # all processes have checked the unchanged folder
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            # "latest": the next command resumes from the newest checkpoint.
            write_yaml(self.folder / "config.yaml", replace(config, resume="latest"))
            if trained_on:
                update_run_metadata(self.folder, trained_on=trained_on)
            run_id = record_environment(self.folder, self.accelerator)
            if config.report_to:
                start_trackers(self.accelerator, self.folder, run_id, to_mapping(config))
        torch.manual_seed(config.seed)  # initial weights: the same on every process

    def steps(self, batch_images: int, description: str) -> Iterator[int]:
        """Yield the remaining steps, each with torch seeded from (seed, step, process).

        Args:
            batch_images: Images per process and batch, for the progress bar.
            description: Label of the progress bar.

        Raises:
            Interrupted: A process received SIGTERM or SIGINT; the run was saved.
        """
        config, processes = self.config, self.accelerator.num_processes
        images_per_step = batch_images * config.accumulation_steps * processes
        bar = self.start_progress(self.step, images_per_step, description)
        precision = reduced_matmul_precision(self.accelerator.device, config.matmul_precision == "high")
        with bar, precision, stop_on_signal() as stop_request:
            for step in range(self.step + 1, config.max_steps + 1):
                self._seed(step_seed(config.seed, step, self.accelerator.process_index))
                yield step
                self.step = step
                bar.update(images_per_step)
                self._stop_if_requested(stop_request)
            # After resuming from the last step, this deletes later checkpoints.
            if self.step and newest_step(self.folder) > self.step:
                self.checkpoint(self.step)
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _seed(self, seed: int) -> None:
        """Seed torch like `torch.manual_seed`, without queueing a call for each absent kind of device."""
        torch.default_generator.manual_seed(seed)
        if self.accelerator.device.type != "cpu":
            torch.get_device_module(self.accelerator.device).manual_seed(seed)

    def _max_over_processes(self, number: int) -> int:
        """Return the maximum of a number over all processes."""
        if self.accelerator.num_processes == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def _stop_if_requested(self, stop_request: StopRequest) -> None:
        """Save and raise Interrupted on all processes after the same step, once any process received a signal."""
        if not (signal_number := self._max_over_processes(stop_request.signal_number)):
            return
        if self.step < self.config.max_steps and newest_step(self.folder) != self.step:
            self.checkpoint(self.step)
        # No process leaves before all have saved. One that is through here may have closed its connection already.
        with suppress(RuntimeError):
            self.accelerator.wait_for_everyone()
        how = (
            "run the same command again" if self.config.resume == "latest" else "run the command again without --resume"
        )
        raise Interrupted(
            signal_number,
            f"stopped by {signal.Signals(signal_number).name} after step {self.step} of {self.config.max_steps}; "
            f"saved in {self.folder}; {how} to resume",
        )

    def optimizer_step(
        self,
        step: int,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        terms: Mapping[str, Tensor],
        max_norm: float,
        name: str = "",
    ) -> bool:
        """Clip the gradients, take the optimizer step if all values are finite, and clear the gradients.

        Before the last batch of a gradient accumulation, no step is taken and nothing is checked.

        Args:
            step: Current step.
            optimizer: Prepared optimizer.
            model: Model of the optimizer.
            terms: Scalar loss terms by name.
            max_norm: Maximum global norm of the gradients; 0 disables clipping.
            name: Name of a second optimizer; empty for the main one.

        Returns:
            False if a checked value was not finite.

        Raises:
            NonFiniteLossError: Too many steps in a row were not finite.
        """
        all_finite = True
        if self.accelerator.sync_gradients:
            total_norm = self.accelerator.clip_grad_norm_(model.parameters(), max_norm or math.inf)
            norm = self.gradient_norms[name] = math.nan if total_norm is None else float(gather_tensors(total_norm))
            has_scaler = self.accelerator.scaler is not None  # fp16: the scaler skips overflow and lowers its scale
            guard = self.guards[name]
            checked_norm = 0.0 if has_scaler or total_norm is None else norm
            all_finite = guard.allows(terms, checked_norm, self._max_over_processes)
            if not all_finite:
                self._record_skipped_step(step, model, guard)
            elif (median_norm := guard.detect_spike(norm)) is not None:
                prefix = name and f"{name}_"
                self.log_row(step, {f"{prefix}gradient_norm_spike": norm, f"usual_{prefix}gradient_norm": median_norm})
            if all_finite or has_scaler:
                optimizer.step()
            all_finite = all_finite and (not has_scaler or math.isfinite(norm))
        optimizer.zero_grad()
        return all_finite

    def _record_skipped_step(self, step: int, model: nn.Module, guard: NonFiniteGuard) -> None:
        """Record the examples of a skipped step; raise NonFiniteLossError after too many in a row."""
        process, unwrapped = self.accelerator.process_index, self.unwrap(model)
        row = {"step": step, "process": process, "source_ids": self.source_ids(step)}
        row |= {name: str(value) for name, value in guard.non_finite_values.items()}  # JSON has no NaN
        MetricLog(self.folder / f"skipped_steps.{process}.jsonl").append(row)
        if guard.is_exhausted:
            raise guard.build_error(step, find_first_non_finite(unwrapped, self._inputs.get(unwrapped, ())))


def step_seed(seed: int, step: int, process: int) -> int:
    """Return a different seed in [0, 2^63) for each (seed, step, process). The constants are odd 64-bit multipliers."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + process * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) & (2**63 - 1)


def check_launcher_precision(config: RunConfig) -> None:
    """Raise UserError if `accelerate launch` and the run have different mixed precisions."""
    launcher_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher_precision not in ("no", config.mixed_precision):
        raise UserError(
            f"accelerate launch sets mixed precision {launcher_precision} and --mixed-precision is {config.mixed_precision}; "
            f"expected the same; pass --mixed-precision {launcher_precision}"
        )
