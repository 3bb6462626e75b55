"""Exponential moving average of a model's weights and float buffers, with warm-up.

    θ̄ ← d_t θ̄ + (1 − d_t) θ,    d_t = min(d, (1 + t) / (10 + t))

The warm-up keeps the first previews from showing the initial weights. Buffers are averaged too: a codebook kept by
moving averages is a buffer, and left out it would not belong to the averaged encoder.
"""

import copy
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from training_harness.errors import ConfigError

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    decay: float = 0.999
    """Share of the average that a step keeps, once warmed up; 0 follows the weights."""
    device: Literal["same", "cpu"] = "same"
    """`cpu` keeps the average out of an accelerator's memory, at the price of a copy a step and of slow previews."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"ema.decay is {self.decay}; expected a share in [0, 1) such as 0.999")


class EMA(Generic[Model]):
    """`model` is the averaged copy: what gets saved, sampled and evaluated."""

    def __init__(self, source: Model, config: EMAConfig) -> None:
        self.config = config
        self.model = copy.deepcopy(source).eval().requires_grad_(False)
        if config.device == "cpu":
            self.model.cpu()
        self._pairs = list(zip(_tensors(self.model), _tensors(source), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the source's weights after optimiser step `step` (from 1)."""
        decay = min(self.config.decay, (1 + step) / (10 + step))
        floats = [(average, value) for average, value in self._pairs if value.is_floating_point()]
        averages, values = [average for average, _ in floats], [value.to(average.device) for average, value in floats]
        torch._foreach_lerp_(averages, values, 1 - decay)
        for average, value in self._pairs:
            if not value.is_floating_point():
                average.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
