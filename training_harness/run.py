"""One training run: its folder, its processes, its steps.

    runs/NAME/config.yaml   environment.json   metrics.jsonl   samples/   checkpoints/step_000500/   model/

A step is an optimizer step, counted from 1. What a step draws at random is a function of (seed, step, process), so a resumed run
needs no stored generator.
"""

import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping
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
    def __init__(self, config: RunConfig, trained_on: str = "") -> None:
        """Starts a run, or continues the one in the folder.

        Args:
            trained_on: fingerprint of the images or codes. The run is known by it when folders were moved or renamed.
        """
        RunLogging.__init__(self)
        RunCheckpointing.__init__(self)
        self.config, self.folder = config, config.output
        keep_freed_memory()
        check_trackers(config.report_to)
        check_launcher_precision(config)
        accelerated_device()  # joins the other processes
        AcceleratorState._reset_state()  # or a second run in one process could not have a precision of its own
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
        """Ids of the examples that this process saw in a step; the loop sets it."""
        self.accelerator.wait_for_everyone()  # until each has looked at the folder as it was
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            # The next command goes on from the newest checkpoint.
            write_yaml(self.folder / "config.yaml", replace(config, resume="latest"))
            if trained_on:
                update_run_metadata(self.folder, trained_on=trained_on)
            run_id = record_environment(self.folder, self.accelerator)
            if config.report_to:
                start_trackers(self.accelerator, self.folder, run_id, to_mapping(config))
        torch.manual_seed(config.seed)  # initial weights: the same on every process

    def steps(self, unit: int, describe: str) -> Iterator[int]:
        """Steps left to do, with a progress bar in images; seeds torch for each from (seed, step, process)."""
        config, processes = self.config, self.accelerator.num_processes
        images = unit * config.accumulation_steps * processes
        bar = self.start_progress(self.step, images, describe)
        rounded = reduced_matmul_precision(self.accelerator.device, config.matmul_precision == "high")
        with bar, rounded, stop_on_signal() as wish:
            for step in range(self.step + 1, config.max_steps + 1):
                self._seed(step_seed(config.seed, step, self.accelerator.process_index))
                yield step
                self.step = step
                bar.update(images)
                self._stop_if_requested(wish)
            if self.step and newest_step(self.folder) > self.step:  # chosen to be the last: later checkpoints give way
                self.checkpoint(self.step)
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _seed(self, seed: int) -> None:
        """What torch.manual_seed does, without a record of the call for each kind of device that is not there."""
        torch.default_generator.manual_seed(seed)
        if self.accelerator.device.type != "cpu":
            torch.get_device_module(self.accelerator.device).manual_seed(seed)

    def _max_over_processes(self, number: int) -> int:
        """The largest of the processes' numbers: what one of them found is then known to all."""
        if self.accelerator.num_processes == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def _stop_if_requested(self, wish: StopRequest) -> None:
        """Saves and raises Interrupted once any process was told to stop, on all of them after the same step."""
        if not (number := self._max_over_processes(wish.signal_number)):
            return
        if self.step < self.config.max_steps and newest_step(self.folder) != self.step:
            self.checkpoint(self.step)
        self.accelerator.wait_for_everyone()
        raise Interrupted(
            number,
            f"stopped by {signal.Signals(number).name} after step {self.step} of {self.config.max_steps}; saved in {self.folder}; "
            + (
                "run the same command again to go on"
                if self.config.resume == "latest"
                else "run the command again without --resume to go on"
            ),
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
        """Clips and steps once gradients are complete, unless the loss or a gradient is not finite; clears them then.

        `name` tells a second optimiser from the main one. Returns whether all was finite, as far as was looked at.
        """
        finite = True
        if self.accelerator.sync_gradients:
            found = self.accelerator.clip_grad_norm_(model.parameters(), max_norm or math.inf)
            norm = self.gradient_norms[name] = math.nan if found is None else float(gather_tensors(found))
            scaled = self.accelerator.scaler is not None  # fp16: overflow is the scaler's to skip, and to learn from
            guard = self.guards[name]
            finite = guard.allows(terms, 0.0 if scaled or found is None else norm, self._max_over_processes)
            if not finite:
                self._record_skipped_step(step, model, guard)
            elif (usual := guard.detect_spike(norm)) is not None:
                prefix = name and f"{name}_"
                self.log_row(step, {f"{prefix}gradient_norm_spike": norm, f"usual_{prefix}gradient_norm": usual})
            if finite or scaled:
                optimizer.step()
            finite = finite and (not scaled or math.isfinite(norm))
        optimizer.zero_grad()
        return finite

    def _record_skipped_step(self, step: int, model: nn.Module, guard: NonFiniteGuard) -> None:
        """Notes the examples of a step that is not taken; raises NonFiniteLossError after too many in a row."""
        process, network = self.accelerator.process_index, self.unwrap(model)
        row = {"step": step, "process": process, "source_ids": self.source_ids(step)}
        row |= {name: str(value) for name, value in guard.non_finite_values.items()}  # JSON knows no NaN
        MetricLog(self.folder / f"skipped_steps.{process}.jsonl").append(row)
        if guard.is_exhausted:
            raise guard.build_error(step, find_first_non_finite(network, self._inputs.get(network, ())))


def step_seed(seed: int, step: int, process: int) -> int:
    """A seed that differs for every (seed, step, process); the constants are 64-bit odd multipliers."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + process * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) & (2**63 - 1)


def check_launcher_precision(config: RunConfig) -> None:
    """Raises UserError when `accelerate launch` was asked for another precision than the run."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", config.mixed_precision):
        raise UserError(
            f"accelerate launch asks for the mixed precision {launched} and --mixed-precision is {config.mixed_precision}; "
            f"expected the same; give --mixed-precision {launched}"
        )
