"""The options that both training verbs have beside the fields of a training configuration."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    config: Path | None = None
    """YAML file with values that replace those of the recipe; the config.yaml of a run repeats that run. (default: none)"""
    minutes: float | None = None
    """Time limit: sets --max-steps once, at the start, to what fits on this machine. (default: no limit)"""
    dry_run: bool = False
    """Print the time and the memory that the run would take, and write nothing."""
    overfit_batch: bool = False
    """Check the set-up: train on one batch alone, in a folder beside --output, and print whether the loss fell."""


TRAINING_GROUPS = {
    "configuration": ("recipe", "config", "prior"),
    "training": (
        *(
            "max_steps",
            "minutes",
            "batch_size",
            "accumulation_steps",
            "class_dropout",
            "degradation",
            "perceptual",
            "seed",
        ),
        *("mixed_precision", "matmul_precision", "compile", "gradient_checkpointing"),
    ),
    "logging and checkpoints": (
        "log_every",
        "sample_every",
        "checkpoint_every",
        "keep_checkpoints",
        "resume",
        "report_to",
    ),
    "checks before training": ("dry_run", "overfit_batch"),
}
"""Groups of options that both training verbs have. Each verb adds a group for its data."""
