"""Checkpoints of a run: the state of every object registered with `track`."""

import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from training_harness.checkpoints import (
    CorruptCheckpointError,
    list_checkpoints,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from training_harness.errors import UserError
from training_harness.files import remove_incomplete
from training_harness.guard import NonFiniteGuard
from training_harness.metric_log import MetricLog
from training_harness.run_config import RunConfig
from training_harness.sharding import gather_tensors, load_state


class Stateful(Protocol):
    """An object with a state that a checkpoint can store."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class RunCheckpointing:
    """The part of a `Run` that saves and resumes."""

    config: RunConfig
    accelerator: Accelerator
    folder: Path
    log_file: MetricLog

    def __init__(self) -> None:
        self.step = 0
        self.best: dict[str, float] | None = None
        """Step and value of the best validation metric so far; lower is better."""
        self.guards: defaultdict[str, NonFiniteGuard] = defaultdict(NonFiniteGuard)
        """Guards by the name of the optimizer; "" is the main one."""
        self.on_validation: Callable[[int, float], None] = lambda step, metric: None
        """Called with (step, validation metric); an exception that it raises ends the run."""
        self._tracked: dict[str, Stateful] = {}
        self._inputs: dict[nn.Module, tuple[Any, ...]] = {}  # inputs of the last forward pass of each network

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP shards the model over the processes."""
        return self.accelerator.distributed_type is DistributedType.FSDP

    def unwrap(self, model: nn.Module) -> Any:
        """Return the model without the wrappers of `accelerator.prepare`."""
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def track(self, **objects: Stateful) -> None:
        """Register the objects that checkpoints store, and load the checkpoint to resume from if there is one."""
        self._tracked = {
            name: self.unwrap(stateful) if isinstance(stateful, nn.Module) else getattr(stateful, "optimizer", stateful)
            for name, stateful in objects.items()
        }
        for stateful in self._tracked.values():
            if isinstance(stateful, nn.Module):
                stateful.register_forward_pre_hook(self._record_inputs)
        if (state := self._state_to_resume()) is not None:
            for name, stateful in self._tracked.items():
                load_state(stateful, state["objects"][name])
            if self.accelerator.scaler is not None and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.step, self.best = state["step"], state["best"]
            for name, count in state["skipped_in_a_row"].items():
                self.guards[name].consecutive_skips = count
        if self.accelerator.is_main_process:
            remove_incomplete(self.folder / "checkpoints")
            self.log_file.rewind(self.step)
            if self.step:
                self.log_file.append({"step": self.step, "resumed_from": self.step})
                print(f"{self.folder}: resuming from step {self.step}", file=sys.stderr)

    def _record_inputs(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._inputs[module] = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)

    def _state_to_resume(self) -> dict[str, Any] | None:
        if self.config.resume != "latest":
            return read_checkpoint(self._checkpoint_to_resume())
        for path in reversed(list_checkpoints(self.folder)):
            try:
                return read_checkpoint(path)
            except CorruptCheckpointError as error:
                if self.accelerator.is_main_process:
                    print(f"skipping corrupt checkpoint {path}: {error}", file=sys.stderr)
        return None

    def _checkpoint_to_resume(self) -> Path:
        """Return the checkpoint that `--resume` names; raise UserError if it does not exist."""
        existing = {path.name: path for path in list_checkpoints(self.folder)}
        if self.config.resume not in existing:
            raise UserError(
                f"--resume is {self.config.resume} and {self.folder} has {', '.join(existing) or 'no checkpoint'}; expected one "
                "of these checkpoints or latest"
            )
        return existing[self.config.resume]

    def record_validation(self, step: int, metric: float) -> None:
        """Record a validation metric, lower is better; the checkpoint of the best one is kept."""
        if self.best is None or metric < self.best["value"]:
            self.best = {"step": step, "value": metric}
        self.on_validation(step, metric)

    def is_checkpoint_due(self, step: int) -> bool:
        """Return whether to save at this step: every `checkpoint_every` steps, at the last step and at the best step."""
        is_best = self.best is not None and self.best["step"] == step
        return step % self.config.checkpoint_every == 0 or step == self.config.max_steps or is_best

    def checkpoint(self, step: int) -> None:
        """Save the state of every tracked object; delete all but the newest `keep_checkpoints` and the best checkpoint."""
        objects: dict[str, Any] = {}
        if self.accelerator.is_main_process or self.is_sharded:  # all processes gather shards
            objects = {name: gather_tensors(stateful.state_dict()) for name, stateful in self._tracked.items()}
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "step": step,
                "best": self.best,
                "skipped_in_a_row": {name: guard.consecutive_skips for name, guard in self.guards.items()},
                "scaler": None if scaler is None else scaler.state_dict(),
                "objects": objects,
            }
            write_checkpoint(self.folder, step, state)
            best = None if self.best is None else int(self.best["step"])
            prune_checkpoints(self.folder, step, self.config.keep_checkpoints, best)
        self.accelerator.wait_for_everyone()
