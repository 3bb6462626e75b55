"""The part of a training configuration that both stages have."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from training_harness.errors import ConfigError
from training_harness.migration import Migration
from training_harness.trackers import TrackerName


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run writes, how long it trains, and how often it logs, samples and saves."""

    migration: ClassVar[Migration] = Migration("run configuration")

    output: Path
    """Run folder."""
    seed: int = 0
    """Random seed."""
    max_steps: int = 2000
    """Optimiser steps; a larger number extends a finished run."""
    batch_size: int = 64
    """Images a process and step."""
    accumulation_steps: int = 1
    """Batches whose gradients make up one optimiser step."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """`bf16` and `fp16` halve the memory of activations and make most steps faster, on GPUs that support them."""
    matmul_precision: Literal["highest", "high"] = "high"
    """Of products of float32 in training: `high` lets GPUs use TF32 and CPUs with AMX bfloat16 inside."""
    compile: bool = False
    """Compiles the networks with torch.compile: some minutes once, then quicker steps on most GPUs."""
    gradient_checkpointing: bool = False
    """Computes each block's activations again in the backward pass: much less memory, about a third more time."""
    report_to: tuple[TrackerName, ...] = ()
    """Trackers that get figures and samples too: tensorboard, wandb, trackio; needs `pip install "latentloom[track]"`."""
    log_every: int = 25
    """Steps between two lines in the log."""
    sample_every: int = 500
    """Steps between two validations with sample images."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, beside the one of the best validation figure."""
    resume: str = "latest"
    """Checkpoint that a run goes on from, such as step_000500; those of later steps give way to the new ones."""

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
