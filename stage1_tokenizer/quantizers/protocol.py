"""What every quantizer offers, and what their configurations share.

    latents (B, c, h, w) → forward → quantized, indices, losses by name        lookup(quantize(z)) is what forward decodes

Indices are (B, h, w), or (B, depth, h, w) of a residual quantizer. A quantizer gives the loss terms that it has; the loop
weighs each by the field of that name. In training mode forward may also change what is no parameter, such as a codebook of
moving averages.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training_harness.errors import ConfigError

MOST_CODES = 2**24  # each is counted


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Each quantizer has a dataclass of its own, beside its class: its `name`, and its options."""

    name: str
    """Quantizer: ema, vq, simvq, ibq, fsq, lfq, bsq or residual."""

    def check(self, codebook_size: int, channels: int) -> None:
        """Raises ConfigError when K and the latent channels are not those of the quantizer."""
        if codebook_size > MOST_CODES:
            raise ConfigError(
                f"model.codebook_size is {codebook_size}; expected at most {MOST_CODES}, as 2^18 is large"
            )


@dataclass(frozen=True, kw_only=True)
class EntropyQuantizerConfig(QuantizerConfig):
    """Of a quantizer with an entropy loss."""

    entropy_temperature: float = 1.0
    """How soft the choice is by which the entropy loss judges it."""

    def __post_init__(self) -> None:
        if self.entropy_temperature <= 0:
            raise ConfigError(
                f"model.quantizer.entropy_temperature is {self.entropy_temperature}; expected a positive number"
            )


class QuantizerOutput(NamedTuple):
    quantized: Tensor  # (B, c, h, w); its gradient reaches the latents
    indices: Tensor  # (B, h, w) int64 in [0, K), or (B, depth, h, w)
    losses: dict[str, Tensor]  # float32 scalars, unweighted


class Quantizer(nn.Module):
    """A discrete bottleneck of `codebook_size` codes of `channels` numbers."""

    depth = 1

    def __init__(self, config: QuantizerConfig, codebook_size: int, channels: int) -> None:
        super().__init__()
        self.config, self.codebook_size, self.channels = config, codebook_size, channels

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """latents: (B, c, h, w)."""
        raise NotImplementedError

    def quantize(self, latents: Tensor) -> Tensor:
        """Indices of latents (B, c, h, w)."""
        raise NotImplementedError

    def lookup(self, indices: Tensor) -> Tensor:
        """What is decoded for indices: (B, c, h, w)."""
        raise NotImplementedError

    def indices_to_latents(self, indices: Tensor) -> Tensor:
        """Latents (B, c, h, w) that stand for indices: those that `quantize` gives these for, but of `ibq` and `residual`, of
        which some codes are chosen for no latent that is a code."""
        return self.lookup(indices)


def as_vectors(latents: Tensor) -> Tensor:
    """(B, c, h, w) → (B·h·w, c)."""
    return latents.movedim(1, -1).reshape(-1, latents.shape[1])


def as_maps(vectors: Tensor, like: Tensor) -> Tensor:
    """(B·h·w, c) → (B, c, h, w), in the type of `like`."""
    batch, _, height, width = like.shape
    return vectors.view(batch, height, width, -1).movedim(-1, 1).to(like.dtype)


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over processes."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_reduce_mean(values: Tensor) -> Tensor:
    """Mean over processes, through which gradients pass."""
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.nn.functional import all_reduce

        return all_reduce(values) / dist.get_world_size()
    return values


def all_gather(values: Tensor) -> Tensor:
    """(N, …) of every process, one after another: (processes · N, …)."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def all_finite(values: Tensor) -> bool:
    """Whether no process holds a number that is not finite."""
    return not all_reduce_sum((~values.detach().isfinite()).any().to(values.dtype))
