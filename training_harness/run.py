"""One training run: its folder, its processes, where it stands, what it logs and saves.

    runs/NAME/config.yaml   environment.json   metrics.jsonl   samples/   checkpoints/step_000500/   model/

A step is an optimiser step, counted from 1; what a step draws at random is a function of (seed, step, process), so a
resumed run needs no stored generator. A checkpoint holds the state of every object registered with `Run.track`.
"""

import math
import os
import re
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from torch import Tensor, nn
from tqdm.auto import tqdm

from training_harness.allocator import keep_freed_memory
from training_harness.checkpoints import (
    TornCheckpointError,
    checkpoints_in,
    newest_step,
    prune,
    read_checkpoint,
    remove_partial,
    write_checkpoint,
)
from training_harness.configuration import to_mapping, write_yaml
from training_harness.errors import ConfigError, UserError
from training_harness.guard import NonFiniteGuard, first_non_finite
from training_harness.matmul_precision import rounded_products
from training_harness.metric_log import MetricLog
from training_harness.processes import accelerated_device
from training_harness.provenance import note_environment
from training_harness.sharding import load_state, whole
from training_harness.signals import Interrupted, Wish, wish_to_stop
from training_harness.trackers import TrackerName, check_trackers, log_figures, log_picture, start_trackers


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The part of a training configuration that both stages have."""

    output: Path
    """Run folder."""
    seed: int = 0
    max_steps: int = 2000
    """Optimiser steps; a larger number extends a finished run."""
    batch_size: int = 64
    """Images a process and step."""
    accumulation_steps: int = 1
    """Batches whose gradients make up one optimiser step."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    matmul_precision: Literal["highest", "high"] = "high"
    """Of products of float32 in training: `high` lets GPUs use TF32 and CPUs with AMX bfloat16 inside."""
    compile: bool = False
    """Compiles the networks with torch.compile: some minutes once, then quicker steps on most GPUs."""
    gradient_checkpointing: bool = False
    """Computes each block's activations again in the backward pass: much less memory, about a third more time."""
    report_to: tuple[TrackerName, ...] = ()
    """Trackers that get figures and samples too: tensorboard, wandb, trackio; needs `pip install "latentloom[track]"`."""
    log_every: int = 25
    sample_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    """Newest checkpoints kept, beside the one of the best validation figure."""
    resume: str = "latest"
    """Checkpoint that a run goes on from, such as step_000500; those of later steps give way to the new ones."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "accumulation_steps", "log_every", "sample_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} is {getattr(self, name)}; expected a whole number of at least 1")
        if self.keep_checkpoints < 1:
            raise ConfigError(f"--keep-checkpoints is {self.keep_checkpoints}; expected at least 1, to resume from")
        if self.resume != "latest" and not re.fullmatch(r"step_\d+", self.resume):
            raise ConfigError(f"--resume is {self.resume}; expected latest, or a checkpoint such as step_000500")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed is {self.seed}; expected a whole number from 0 to 2^63 − 1")


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Run:
    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.folder = config.output
        keep_freed_memory()
        check_trackers(config.report_to)
        check_launcher(config)
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
        self.guards: defaultdict[str, NonFiniteGuard] = defaultdict(NonFiniteGuard)
        """By the name of the optimiser, "" for the main one."""
        self.step = 0
        self.best: dict[str, float] | None = None
        """Step and value of the best validation figure so far."""
        self.gradient_norms: dict[str, float] = {}
        self.sources: Callable[[int], list[str]] = lambda step: []
        """Ids of the examples that this process saw in a step; the loop says how to find them."""
        self.on_validation: Callable[[int, float], None] = lambda step, figure: None
        """Told of each validation figure, the lower the better; what it raises ends the run."""
        self._inputs: dict[nn.Module, tuple[Any, ...]] = {}  # of each network's last forward pass
        self._tracked: dict[str, Stateful] = {}
        self._bar: tqdm | None = None
        self.accelerator.wait_for_everyone()  # until each has looked at the folder as it was
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            # The next command goes on from the newest checkpoint.
            write_yaml(self.folder / "config.yaml", replace(config, resume="latest"))
            run_id = note_environment(self.folder, self.accelerator)
            if config.report_to:
                start_trackers(self.accelerator, self.folder, run_id, to_mapping(config))
        torch.manual_seed(config.seed)  # initial weights: the same on every process

    @property
    def sharded(self) -> bool:
        """Whether FSDP lays the model over the processes."""
        return self.accelerator.distributed_type is DistributedType.FSDP

    # -- where the run stands -------------------------------------------------------------------------------------

    def track(self, **objects: Stateful) -> None:
        """Registers what a checkpoint holds, and loads the newest checkpoint when there is one."""
        self._tracked = {
            name: self.unwrap(thing) if isinstance(thing, nn.Module) else getattr(thing, "optimizer", thing)
            for name, thing in objects.items()
        }
        for thing in self._tracked.values():
            if isinstance(thing, nn.Module):
                thing.register_forward_pre_hook(self._note_inputs)
        if (state := self._state_to_go_on_from()) is not None:
            for name, thing in self._tracked.items():
                load_state(thing, state["objects"][name])
            if self.accelerator.scaler is not None and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.step, self.best = state["step"], state["best"]
            for name, count in state["skipped_in_a_row"].items():
                self.guards[name].in_a_row = count
        if self.accelerator.is_main_process:
            remove_partial(self.folder)
            self.log_file.rewind(self.step)
            if self.step:
                self.log_file.append({"step": self.step, "resumed_from": self.step})
                print(f"{self.folder}: going on from step {self.step}", file=sys.stderr)

    def unwrap(self, model: nn.Module) -> Any:
        """The model under what `prepare` has put around it."""
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def _note_inputs(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._inputs[module] = tuple(given.detach() if isinstance(given, Tensor) else given for given in inputs)

    def _state_to_go_on_from(self) -> dict[str, Any] | None:
        if self.config.resume != "latest":
            return read_checkpoint(self._chosen_checkpoint())
        for path in reversed(checkpoints_in(self.folder)):
            try:
                return read_checkpoint(path)
            except TornCheckpointError as error:
                if self.accelerator.is_main_process:
                    print(f"passing over {path}: {error}", file=sys.stderr)
        return None

    def _chosen_checkpoint(self) -> Path:
        held = {path.name: path for path in checkpoints_in(self.folder)}
        if self.config.resume not in held:
            raise UserError(
                f"--resume is {self.config.resume} and {self.folder} has {', '.join(held) or 'no checkpoint'}; expected one of "
                "those, or latest"
            )
        return held[self.config.resume]

    def steps(self, unit: int, describe: str) -> Iterator[int]:
        """Steps left to do, with a progress bar in images; seeds torch for each from (seed, step, process)."""
        config, processes = self.config, self.accelerator.num_processes
        images = unit * config.accumulation_steps * processes
        self._bar = tqdm(
            total=config.max_steps * images,
            initial=self.step * images,
            desc=describe,
            unit="image",
            unit_scale=True,
            disable=None if self.accelerator.is_main_process else True,
            dynamic_ncols=True,
        )
        self._started, self._first, self._images = time.perf_counter(), self.step, images
        rounded = rounded_products(self.accelerator.device, config.matmul_precision == "high")
        with self._bar, rounded, wish_to_stop() as wish:
            for step in range(self.step + 1, config.max_steps + 1):
                self._seed(seed_of(config.seed, step, self.accelerator.process_index))
                yield step
                self.step = step
                self._bar.update(images)
                self._stop_if_told(wish)
            if self.step and newest_step(self.folder) > self.step:  # chosen to be the last: later checkpoints give way
                self.checkpoint(self.step)
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _seed(self, seed: int) -> None:
        """What torch.manual_seed does, without a record of the call for each kind of device that is not there."""
        torch.default_generator.manual_seed(seed)
        if self.accelerator.device.type != "cpu":
            torch.get_device_module(self.accelerator.device).manual_seed(seed)

    def _anywhere(self, number: int) -> int:
        """The largest of the processes' numbers: what one of them found is then known to all."""
        if self.accelerator.num_processes == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def _stop_if_told(self, wish: Wish) -> None:
        """Saves and raises Interrupted once any process was told to stop, on all of them after the same step."""
        if not (number := self._anywhere(wish.number)):
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

    def due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.config.max_steps

    # -- what it says and saves -------------------------------------------------------------------------------------

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
            norm = self.gradient_norms[name] = math.nan if found is None else float(whole(found))
            scaled = self.accelerator.scaler is not None  # fp16: overflow is the scaler's to skip, and to learn from
            guard = self.guards[name]
            finite = guard.allows(terms, 0.0 if scaled or found is None else norm, self._anywhere)
            if not finite:
                self._skip(step, model, guard)
            elif (usual := guard.spike(norm)) is not None:
                prefix = name and f"{name}_"
                self.log_row(step, {f"{prefix}gradient_norm_spike": norm, f"usual_{prefix}gradient_norm": usual})
            if finite or scaled:
                optimizer.step()
            finite = finite and (not scaled or math.isfinite(norm))
        optimizer.zero_grad()
        return finite

    def _skip(self, step: int, model: nn.Module, guard: NonFiniteGuard) -> None:
        """Notes the examples of a step that is not taken; raises NonFiniteLossError after too many in a row."""
        process, network = self.accelerator.process_index, self.unwrap(model)
        row = {"step": step, "process": process, "source_ids": self.sources(step)}
        row |= {name: str(value) for name, value in guard.wrong.items()}  # JSON knows no NaN
        MetricLog(self.folder / f"skipped_steps.{process}.jsonl").append(row)
        if guard.exhausted:
            raise guard.error(step, first_non_finite(network, self._inputs.get(network, ())))

    def log(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Averages the values over processes and appends them as one row, every `log_every` steps."""
        if not self.due(step, self.config.log_every):
            return
        numbers = torch.tensor(
            [float(torch.as_tensor(v).detach()) for v in values.values()], device=self.accelerator.device
        )
        numbers = self.accelerator.reduce(numbers, reduction="mean")
        row = dict(zip(values, numbers.tolist(), strict=True))
        for name, norm in self.gradient_norms.items():
            if math.isfinite(norm):
                row[f"{name}_gradient_norm" if name else "gradient_norm"] = norm
        rate = (step - self._first) * self._images / (time.perf_counter() - self._started)
        self.log_row(step, row | {"images_per_second": rate})
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.3g}" for name, value in list(row.items())[:3]}, refresh=False)

    def log_row(self, step: int, row: Mapping[str, float]) -> None:
        """Appends figures that are the same on every process."""
        rounded = {name: float(f"{value:.6g}") for name, value in row.items()}
        if self.accelerator.is_main_process:
            self.log_file.append({"step": step} | rounded)
        log_figures(self.accelerator, rounded, step)

    def warn(self, step: int, about: str, text: str) -> None:
        """Says what the user should know now, and keeps it in the log."""
        if self.accelerator.is_main_process:
            self.log_file.append({"step": step, "warning": text, "about": about})
            tqdm.write(f"warning at step {step}: {text}", file=sys.stderr)

    def picture(self, step: int) -> Path:
        """Where samples are saved after a step."""
        return self.folder / "samples" / f"step_{step:06d}.png"

    def show_picture(self, step: int) -> None:
        """Hands the samples of a step to the trackers."""
        if self.accelerator.is_main_process and self.config.report_to:
            log_picture(self.accelerator, self.picture(step), step)

    def judge(self, step: int, figure: float) -> None:
        """Notes a validation figure, the lower the better: the checkpoint of the best one is kept."""
        if self.best is None or figure < self.best["value"]:
            self.best = {"step": step, "value": figure}
        self.on_validation(step, figure)

    def checkpoint_due(self, step: int) -> bool:
        return self.due(step, self.config.checkpoint_every) or (self.best is not None and self.best["step"] == step)

    def checkpoint(self, step: int) -> None:
        """Writes the state of every tracked object; keeps the newest `keep_checkpoints` and the best."""
        objects: dict[str, Any] = {}
        if self.accelerator.is_main_process or self.sharded:  # shards are gathered by all processes
            objects = {name: whole(thing.state_dict()) for name, thing in self._tracked.items()}
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "step": step,
                "best": self.best,
                "skipped_in_a_row": {name: guard.in_a_row for name, guard in self.guards.items()},
                "scaler": None if scaler is None else scaler.state_dict(),
                "objects": objects,
            }
            write_checkpoint(self.folder, step, state)
            prune(
                self.folder, step, self.config.keep_checkpoints, None if self.best is None else int(self.best["step"])
            )
        self.accelerator.wait_for_everyone()


def seed_of(seed: int, step: int, process: int) -> int:
    """A seed that differs for every (seed, step, process); the constants are 64-bit odd multipliers."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + process * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) & (2**63 - 1)


def check_launcher(config: RunConfig) -> None:
    """Raises UserError when `accelerate launch` was asked for another precision than the run."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", config.mixed_precision):
        raise UserError(
            f"accelerate launch asks for the mixed precision {launched} and --mixed-precision is {config.mixed_precision}; "
            f"expected the same; give --mixed-precision {launched}"
        )
