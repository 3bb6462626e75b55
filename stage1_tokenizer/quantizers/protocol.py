"""What every quantizer offers, and the configuration that chooses one.

    latents (B, c, h, w) → forward → quantized, indices, losses by name        lookup(quantize(z)) is what forward decodes

Indices are (B, h, w), or (B, depth, h, w) of a residual quantizer. A quantizer gives the loss terms that it has; the loop
weighs each by the field of that name. In training mode forward may also change what is no parameter, such as a codebook of
moving averages.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training_harness.errors import ConfigError

QuantizerName = Literal["vq", "ema", "simvq", "ibq", "fsq", "lfq", "bsq", "residual"]
LEARNT = (
    "vq",
    "ema",
    "residual",
)  # codebooks whose entries restart, may lie on the sphere, and may pass gradients turned

MOST_CODES = 2**24  # each is counted


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    name: QuantizerName = "ema"
    usage_decay: float = 0.95
    """Of the moving average of how often each code is chosen, and of an `ema` codebook itself."""
    restart_threshold: float = 0.3
    """Codes chosen less often than this share of the uniform rate are restarted; 0 never."""
    kmeans_iterations: int = 0
    """Of Lloyd's algorithm on the first batch, from which a codebook then starts; 0 starts from vectors of the batch."""
    normalize: bool = False
    """Latents and codes lie on the unit sphere, as in ViT-VQGAN and LlamaGen."""
    gradient: Literal["straight-through", "rotation"] = "straight-through"
    """How the gradient passes the codes: copied, or turned and scaled as the latent is onto its code."""
    levels: tuple[int, ...] = ()
    """Of `fsq`: values a channel takes, such as 8 5 5 5."""
    depth: int = 4
    """Of `residual`: codes a position, each of what the ones before leave over."""
    entropy_temperature: float = 1.0
    """Of `lfq`, `bsq` and `ibq`: how soft the choice is by which the entropy loss judges it."""

    def __post_init__(self) -> None:
        if not 0 <= self.usage_decay < 1 or self.restart_threshold < 0:
            raise ConfigError(
                f"model.quantizer.usage_decay is {self.usage_decay} and restart_threshold {self.restart_threshold}; expected "
                "a share in [0, 1) and 0 or more"
            )
        for name, least in (("kmeans_iterations", 0), ("depth", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"model.quantizer.{name} is {getattr(self, name)}; expected {least} or more")
        if self.entropy_temperature <= 0:
            raise ConfigError(
                f"model.quantizer.entropy_temperature is {self.entropy_temperature}; expected a positive number"
            )
        for name, value in (("normalize", self.normalize), ("gradient", self.gradient == "rotation")):
            if value and self.name not in LEARNT:
                raise ConfigError(
                    f"model.quantizer.{name} is {getattr(self, name)} with the quantizer {self.name}; expected it with "
                    f"{', '.join(LEARNT)} alone; leave it out"
                )
        if bool(self.levels) != (self.name == "fsq") or any(level < 2 for level in self.levels):
            raise ConfigError(
                f"model.quantizer.levels is {list(self.levels)} with the quantizer {self.name}; expected two or more values a "
                "channel for fsq, such as 8 5 5 5, and none for others"
            )

    def check(self, codebook_size: int, channels: int) -> None:
        """Raises ConfigError when K and the latent channels are not those of the quantizer."""
        if self.name == "fsq":
            size = math.prod(self.levels)
            if (codebook_size, channels) != (size, len(self.levels)):
                raise ConfigError(
                    f"model.codebook_size is {codebook_size} and model.latent_channels {channels}; expected {size} and "
                    f"{len(self.levels)}, which model.quantizer.levels {list(self.levels)} multiply and count to"
                )
        if codebook_size > MOST_CODES:
            raise ConfigError(
                f"model.codebook_size is {codebook_size}; expected at most {MOST_CODES}, as 2^18 is large"
            )
        if self.name in ("lfq", "bsq") and codebook_size != 2**channels:
            bits = max(1, round(math.log2(codebook_size)))
            raise ConfigError(
                f"model.codebook_size is {codebook_size} and model.latent_channels {channels}; expected 2^channels codes, a bit "
                f"a channel, for {self.name}: {2**bits} and {bits}"
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

    def latents_of(self, indices: Tensor) -> Tensor:
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


def summed(values: Tensor) -> Tensor:
    """Sum over processes."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def averaged(values: Tensor) -> Tensor:
    """Mean over processes, through which gradients pass."""
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.nn.functional import all_reduce

        return all_reduce(values) / dist.get_world_size()
    return values


def gathered(values: Tensor) -> Tensor:
    """(N, …) of every process, one after another: (processes · N, …)."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def all_finite(values: Tensor) -> bool:
    """Whether no process holds a number that is not finite."""
    return not summed((~values.detach().isfinite()).any().to(values.dtype))
