"""The optimiser and its learning rate, counted in optimiser steps.

    rate(s) = peak · min(1, s / warmup) · decay((s − warmup) / (S − warmup)),    s = 1 … S

A learning rate depends on the step alone, so there is no scheduler to store or restore, and one and many processes follow
the same curve.
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
    name: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the update of each hidden matrix and leaves the other parameters to AdamW."""
    learning_rate: float = 3e-4
    """Peak rate of AdamW's parameters."""
    matrix_learning_rate: float = 0.02
    """Peak rate of Muon's matrices; unused by `adamw`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moving averages."""
    weight_decay: float = 0.01
    """Decoupled; applied to matrices and convolution kernels, never to gains, biases and embeddings."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them."""

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
    warmup: int | float = 0.02
    """An int is a number of steps, a float a share of the run in [0, 1]."""
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    final: float = 0.0
    """Where the decay ends, as a share of the peak."""

    def __post_init__(self) -> None:
        if self.warmup < 0 or (isinstance(self.warmup, float) and self.warmup > 1):
            raise ConfigError(
                f"schedule.warmup is {self.warmup}; expected a share of the run in [0, 1], or steps as an int"
            )

        if not 0 <= self.final <= 1:
            raise ConfigError(f"schedule.final is {self.final}; expected a share of the peak rate in [0, 1]")

    def at(self, step: int, max_steps: int) -> float:
        """Share of the peak rate at optimiser step `step` in [1, max_steps]."""
        warmup = steps_of(self.warmup, max_steps)
        if step <= warmup:
            return step / warmup
        progress = (step - warmup) / max(1, max_steps - warmup)
        shape = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        return self.final + (1 - self.final) * shape[self.decay]


def steps_of(amount: int | float, max_steps: int) -> int:
    """Steps meant by an int (steps) or a float (a share of the run)."""
    return amount if isinstance(amount, int) else round(amount * max_steps)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW or Muon over the parameters that train, each group remembering its peak rate as `peak_lr`."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    embeddings |= {id(p) for name, p in trained if name in getattr(model, "embedding_tables", ())}
    matrices = [p for _, p in trained if p.ndim >= 2 and id(p) not in embeddings]
    others = [p for _, p in trained if p.ndim < 2 or id(p) in embeddings]
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
        ends = [p for name, p in trained if p.ndim >= 2 and id(p) not in embeddings and is_end(model, name)]
        end_ids = {id(p) for p in ends}
        optimizer = Muon(
            [
                {
                    "params": [p for p in matrices if id(p) not in end_ids],
                    "lr": config.matrix_learning_rate,
                    "weight_decay": config.weight_decay,
                    "orthogonalize": True,
                },
                {"params": ends, "weight_decay": config.weight_decay, "orthogonalize": False, **adamw},
                {"params": others, "weight_decay": 0.0, "orthogonalize": False, **adamw},
            ]
        )
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def is_end(model: nn.Module, parameter_name: str) -> bool:
    """Whether a matrix belongs to a model's first or last layer, which the model lists in `end_layers`."""
    return any(parameter_name.startswith(f"{end}.") for end in getattr(model, "end_layers", ()))


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
