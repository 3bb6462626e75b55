"""Training options that both stages share."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from training_harness.errors import ConfigError
from training_harness.migration import Migration
from training_harness.trackers import TrackerName


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Options of a run: output folder, length, precision, and intervals of logging, sampling and saving."""

    migration: ClassVar[Migration] = Migration("run configuration")

    output: Path
    """Run folder."""
    seed: int = 0
    """Seed of initial weights, data order and random numbers, from 0 to 2^63 − 1."""
    max_steps: int = 2000
    """Number of optimizer steps; a larger number extends a finished run."""
    batch_size: int = 64
    """Images per process and batch."""
    accumulation_steps: int = 1
    """Number of batches per optimizer step; their gradients are accumulated."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast type of the forward pass; `no` trains in float32."""
    matmul_precision: Literal["highest", "high"] = "high"
    """Precision of float32 matrix products in training: `high` uses TF32 on GPUs and bfloat16 on CPUs with AMX."""
    compile: bool = False
    """Compile the networks with torch.compile: takes some minutes once, then steps are faster on most GPUs."""
    gradient_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass: much less memory, about a third more time."""
    report_to: tuple[TrackerName, ...] = ()
    """Trackers that receive metrics and samples: tensorboard, wandb, trackio; needs `pip install "latentloom[track]"`."""
    log_every: int = 25
    """Interval of logging, in steps."""
    sample_every: int = 500
    """Interval of validation and samples, in steps."""
    checkpoint_every: int = 500
    """Interval of checkpoints, in steps."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep, in addition to the one with the best validation metric."""
    resume: str = "latest"
    """Checkpoint to resume from: `latest` or a name such as step_000500; checkpoints of later steps are replaced."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", self.output.expanduser())
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
