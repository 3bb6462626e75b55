"""The interface of every quantizer, and the options that their configurations share.

    latents (B, c, h, w) → forward → quantized, indices, losses by name        quantized = lookup(quantize(latents))

Indices are (B, h, w), or (B, depth, h, w) for a residual quantizer. `forward` returns unweighted loss terms by name, and the
training loop weights each term with the `ReconstructionConfig` field of the same name. In training mode `forward` may also
update buffers, such as a codebook of moving averages.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training_harness.errors import ConfigError

MAX_CODEBOOK_SIZE = 2**24  # usage statistics have one counter per code


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Base of the quantizer configurations. Each quantizer has its own dataclass, with its `name` and its options."""

    name: str
    """Quantizer: ema, vq, simvq, ibq, fsq, lfq, bsq or residual."""

    def check(self, codebook_size: int, channels: int) -> None:
        """Raise ConfigError when the quantizer does not support this K and this number of latent channels."""
        if codebook_size > MAX_CODEBOOK_SIZE:
            raise ConfigError(
                f"model.codebook_size is {codebook_size}; expected at most {MAX_CODEBOOK_SIZE}. Large codebooks have 2^18 codes"
            )


@dataclass(frozen=True, kw_only=True)
class EntropyQuantizerConfig(QuantizerConfig):
    """Options of the quantizers with an entropy loss."""

    entropy_temperature: float = 1.0
    """Temperature τ of the soft code assignment in the entropy loss; a higher value makes it softer."""

    def __post_init__(self) -> None:
        if self.entropy_temperature <= 0:
            raise ConfigError(
                f"model.quantizer.entropy_temperature is {self.entropy_temperature}; expected a positive number"
            )


class QuantizerOutput(NamedTuple):
    quantized: Tensor  # (B, c, h, w), with a gradient to the latents
    indices: Tensor  # (B, h, w) int64 in [0, K), or (B, depth, h, w)
    losses: dict[str, Tensor]  # float32 scalars, unweighted


class Quantizer(nn.Module):
    """A discrete bottleneck with `codebook_size` codes, each a vector of `channels` numbers."""

    depth = 1

    def __init__(self, config: QuantizerConfig, codebook_size: int, channels: int) -> None:
        super().__init__()
        self.config, self.codebook_size, self.channels = config, codebook_size, channels

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize latents (B, c, h, w) and compute the loss terms."""
        raise NotImplementedError

    def quantize(self, latents: Tensor) -> Tensor:
        """Return the indices of latents (B, c, h, w)."""
        raise NotImplementedError

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the vectors (B, c, h, w) that the decoder receives for indices."""
        raise NotImplementedError

    def indices_to_latents(self, indices: Tensor) -> Tensor:
        """Return latents (B, c, h, w) that `quantize` maps back to the same indices.

        For `ibq` and `residual` some indices do not map back: the nearest code of their own vector is another one.
        """
        return self.lookup(indices)


def as_vectors(latents: Tensor) -> Tensor:
    """Flatten feature maps (B, c, h, w) to vectors (B·h·w, c)."""
    return latents.movedim(1, -1).reshape(-1, latents.shape[1])


def as_maps(vectors: Tensor, like: Tensor) -> Tensor:
    """Reshape vectors (B·h·w, c) to feature maps (B, c, h, w) with the shape and dtype of `like`."""
    batch, _, height, width = like.shape
    return vectors.view(batch, height, width, -1).movedim(-1, 1).to(like.dtype)


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over processes, in place and without gradients."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_reduce_mean(values: Tensor) -> Tensor:
    """Average over processes, with gradients."""
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.nn.functional import all_reduce

        return all_reduce(values) / dist.get_world_size()
    return values


def all_gather(values: Tensor) -> Tensor:
    """Concatenate the values (N, …) of every process in rank order, to (processes · N, …)."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def all_finite(values: Tensor) -> bool:
    """Return whether the values of all processes are finite."""
    return not all_reduce_sum((~values.detach().isfinite()).any().to(values.dtype))
