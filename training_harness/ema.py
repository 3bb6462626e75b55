"""Exponential moving average (EMA) of a model's weights and float buffers, with warm-up.

    θ̄ ← d_t θ̄ + (1 − d_t) θ,    d_t = min(d, (1 + t) / (10 + t))

With the warm-up, early previews do not show the initial weights. Buffers are averaged too: an EMA codebook is a buffer, and
without averaging it would not match the averaged encoder.
"""

import copy
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training_harness.errors import ConfigError
from training_harness.sharding import gather_shards, local_shard, shard_like

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Options of the exponential moving average."""

    decay: float = 0.999
    """Decay per step in [0, 1) after the warm-up; 0 copies the weights."""
    device: Literal["same", "cpu"] = "same"
    """Device of the average: `cpu` saves accelerator memory, but costs a copy in each step and makes previews slow."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"ema.decay is {self.decay}; expected a number in [0, 1) such as 0.999")


class EMA(Generic[Model]):
    """Exponential moving average of a model; `model` is the averaged copy for saving, sampling and evaluation."""

    def __init__(self, source: Model, config: EMAConfig) -> None:
        self.config = config
        self.model = copy.deepcopy(source).eval().requires_grad_(False)
        self.set_source(source)

    def set_source(self, source: nn.Module) -> None:
        """Average the weights of `source` from now on.

        Args:
            source: The same model as before, for example after `accelerator.prepare`. If it is sharded, each process
                averages its own shards, and `gather_model` gathers them.
        """
        self._sources = _tensors(source)
        device = torch.device("cpu") if self.config.device == "cpu" else self._sources[0].device
        self.model.to(device)
        self._is_sharded = any(isinstance(value, DTensor) for value in self._sources)
        self._averages = _tensors(self.model)
        if self._is_sharded:
            self._averages = [local_shard(value).detach().to(device, copy=True) for value in self._sources]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the weights after optimizer step `step`; steps count from 1."""
        decay = min(self.config.decay, (1 + step) / (10 + step))
        pairs = [(average, local_shard(value)) for average, value in zip(self._averages, self._sources, strict=True)]
        floats = [(average, value) for average, value in pairs if value.is_floating_point()]
        averages, values = [average for average, _ in floats], [value.to(average.device) for average, value in floats]
        torch._foreach_lerp_(averages, values, 1 - decay)
        for average, value in pairs:
            if not value.is_floating_point():
                average.copy_(value)

    @torch.no_grad()
    def gather_model(self) -> Model:
        """Return the complete averaged model. If the model is sharded, every process must call this."""
        if self._is_sharded:
            for tensor, average, source in zip(_tensors(self.model), self._averages, self._sources, strict=True):
                tensor.copy_(gather_shards(average, source) if isinstance(source, DTensor) else average)
        return self.model

    def state_dict(self) -> dict[str, Any]:
        return self.gather_model().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)
        if self._is_sharded:
            for tensor, average, source in zip(_tensors(self.model), self._averages, self._sources, strict=True):
                average.copy_(local_shard(shard_like(tensor, source)))


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
