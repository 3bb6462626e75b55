r"""Residual quantization: several codes per position, each for the residual of the codes before it.

    r_0 = z,    ẑ_i = e^{(i)}_{k_i},    r_{i+1} = r_i − sg[ẑ_i],    ẑ = Σ_i ẑ_i

Lee et al. 2022, arXiv 2203.01941; Zeghidour et al. 2021, arXiv 2107.03312. Each level has its own codebook of moving averages.
The loss terms are means over levels. The gradient of ẑ passes to z as in plain vector quantization.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, cast

import torch
from torch import Tensor, nn

from stage1_tokenizer.quantizers.ema_quantizer import EMAVectorQuantizer, EMAVectorQuantizerConfig
from stage1_tokenizer.quantizers.protocol import Quantizer, QuantizerOutput, as_maps, as_vectors
from stage1_tokenizer.quantizers.vector_quantizer import CodebookConfig, rotate_gradient
from training_harness.errors import ConfigError
from training_harness.precision import upcast


@dataclass(frozen=True, kw_only=True)
class ResidualQuantizerConfig(CodebookConfig):
    name: Literal["residual"] = "residual"
    depth: int = 4
    """Number of codes at each position, each for the residual of the codes before it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1:
            raise ConfigError(f"model.quantizer.depth is {self.depth}; expected 1 or more")

    @property
    def level_config(self) -> EMAVectorQuantizerConfig:
        """Configuration of the codebook of each level."""
        shared = {field.name: getattr(self, field.name) for field in fields(CodebookConfig)}
        return EMAVectorQuantizerConfig(**shared | {"name": "ema", "gradient": "straight-through"})


class ResidualQuantizer(Quantizer):
    config: ResidualQuantizerConfig

    def __init__(self, config: ResidualQuantizerConfig, codebook_size: int, channels: int) -> None:
        super().__init__(config, codebook_size, channels)
        self.depth, level_config = config.depth, config.level_config
        self.levels = nn.ModuleList(
            EMAVectorQuantizer(level_config, codebook_size, channels) for _ in range(config.depth)
        )

    @property
    def _levels(self) -> Iterator[EMAVectorQuantizer]:
        return cast("Iterator[EMAVectorQuantizer]", iter(self.levels))

    def forward(self, latents: Tensor) -> QuantizerOutput:
        residual, total, indices, commitments = upcast(latents), torch.zeros_like(upcast(latents)), [], []
        for level in self._levels:
            output = level(residual)
            codes = output.quantized.detach()
            total, residual = total + codes, residual - codes
            indices.append(output.indices)
            commitments.append(output.losses["commitment"])
        if self.config.gradient == "rotation":
            quantized = as_maps(rotate_gradient(as_vectors(upcast(latents)), as_vectors(total)), latents)
        else:
            quantized = latents + (total - latents).detach().to(latents.dtype)
        return QuantizerOutput(quantized, torch.stack(indices, 1), {"commitment": torch.stack(commitments).mean()})

    def quantize(self, latents: Tensor) -> Tensor:
        """Return the indices (B, depth, h, w) of latents (B, c, h, w)."""
        residual, indices = upcast(latents), []
        for level in self._levels:
            indices.append(level.quantize(residual))
            residual = residual - level.lookup(indices[-1])
        return torch.stack(indices, 1)

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the sum (B, c, h, w) of the codes of all levels for indices (B, depth, h, w)."""
        codes = [
            level.lookup(level_indices) for level, level_indices in zip(self._levels, indices.unbind(1), strict=True)
        ]
        return torch.stack(codes).sum(0)
