"""The optimizer and its learning rate schedule, counted in optimizer steps.

    rate(s) = peak · min(1, s / warmup) · decay((s − warmup) / (S − warmup)),    s = 1 … S

The learning rate depends on the step alone. There is no scheduler state to save, and the schedule does not depend on the number of
processes.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from training_harness.errors import ConfigError
from training_harness.muon import Muon


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Options of the optimizer."""

    name: Literal["adamw", "muon"] = "adamw"
    """Optimizer: `muon` orthogonalizes the updates of hidden matrices and uses AdamW for all other parameters."""
    learning_rate: float = 3e-4
    """Peak learning rate of the parameters that AdamW updates."""
    matrix_learning_rate: float = 0.02
    """Peak learning rate of the matrices that Muon updates; not used by `adamw`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moments, each in [0, 1)."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices and convolution kernels; gains, biases and embeddings do not decay."""
    max_grad_norm: float = 1.0
    """Maximum global norm for gradient clipping; 0 disables clipping."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "matrix_learning_rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}; expected a positive rate such as 3e-4")
        for name in ("weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}; expected 0 or more")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas is {self.betas}; expected two numbers in [0, 1) such as (0.9, 0.95)")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Options of the learning rate schedule."""

    warmup: int | float = 0.02
    """Length of the linear warm-up: an int is a number of steps, a float a fraction of the run in [0, 1]."""
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the decay after the warm-up."""
    final: float = 0.0
    """Learning rate at the end of the decay, as a fraction of the peak in [0, 1]."""

    def __post_init__(self) -> None:
        if self.warmup < 0 or (isinstance(self.warmup, float) and self.warmup > 1):
            raise ConfigError(
                f"schedule.warmup is {self.warmup}; expected a fraction of the run in [0, 1], or steps as an int"
            )
        if not 0 <= self.final <= 1:
            raise ConfigError(f"schedule.final is {self.final}; expected a fraction of the peak rate in [0, 1]")

    def at(self, step: int, max_steps: int) -> float:
        """Return the learning rate at optimizer step `step` in [1, max_steps], as a fraction of the peak."""
        warmup = resolve_steps(self.warmup, max_steps)
        if step <= warmup:
            return step / warmup
        progress = (step - warmup) / max(1, max_steps - warmup)
        shape = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        return self.final + (1 - self.final) * shape[self.decay]


def resolve_steps(amount: int | float, max_steps: int) -> int:
    """Return a number of steps; an int is the number itself, a float a fraction of the run."""
    return amount if isinstance(amount, int) else round(amount * max_steps)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Create AdamW or Muon for the trainable parameters; each group stores its peak learning rate as `peak_lr`."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    embeddings |= {id(p) for name, p in trainable if name in getattr(model, "embedding_tables", ())}
    matrices = [p for _, p in trainable if p.ndim >= 2 and id(p) not in embeddings]
    others = [p for _, p in trainable if p.ndim < 2 or id(p) in embeddings]
    adamw = {"lr": config.learning_rate, "betas": config.betas}
    optimizer: torch.optim.Optimizer
    if config.name == "adamw":
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay, **adamw},
                {"params": others, "weight_decay": 0.0, **adamw},
            ],
            fused=True,
        )
    else:
        end_matrices = [
            p for name, p in trainable if p.ndim >= 2 and id(p) not in embeddings and is_in_end_layer(model, name)
        ]
        end_ids = {id(p) for p in end_matrices}
        optimizer = Muon(
            [
                {
                    "params": [p for p in matrices if id(p) not in end_ids],
                    "lr": config.matrix_learning_rate,
                    "weight_decay": config.weight_decay,
                    "orthogonalize": True,
                },
                {"params": end_matrices, "weight_decay": config.weight_decay, "orthogonalize": False, **adamw},
                {"params": others, "weight_decay": 0.0, "orthogonalize": False, **adamw},
            ]
        )
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def is_in_end_layer(model: nn.Module, parameter_name: str) -> bool:
    """Return whether a parameter belongs to the first or last layer of a model, as listed in its `end_layers`."""
    return any(parameter_name.startswith(f"{layer}.") for layer in getattr(model, "end_layers", ()))


def set_learning_rate(optimizer: torch.optim.Optimizer, fraction: float) -> None:
    """Set the learning rate of each group to a fraction of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * fraction
