r"""Residual quantisation: several codes a position, each of what the ones before leave over.

    r_0 = z,    ẑ_i = e^{(i)}_{k_i},    r_{i+1} = r_i − sg[ẑ_i],    ẑ = Σ_i ẑ_i

Lee et al. 2022, arXiv 2203.01941; Zeghidour et al. 2021, arXiv 2107.03312, with a codebook of moving averages for each level.
The loss terms are means over levels. The gradient of ẑ passes to z as in plain vector quantisation.
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
    """Codes at each position, each of what the ones before leave over."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1:
            raise ConfigError(f"model.quantizer.depth is {self.depth}; expected 1 or more")

    @property
    def level(self) -> EMAVectorQuantizerConfig:
        """Of the codebook of each level."""
        shared = {field.name: getattr(self, field.name) for field in fields(CodebookConfig)}
        return EMAVectorQuantizerConfig(**shared | {"name": "ema", "gradient": "straight-through"})


class ResidualQuantizer(Quantizer):
    config: ResidualQuantizerConfig

    def __init__(self, config: ResidualQuantizerConfig, codebook_size: int, channels: int) -> None:
        super().__init__(config, codebook_size, channels)
        self.depth, inner = config.depth, config.level
        self.levels = nn.ModuleList(EMAVectorQuantizer(inner, codebook_size, channels) for _ in range(config.depth))

    @property
    def _levels(self) -> Iterator[EMAVectorQuantizer]:
        return cast("Iterator[EMAVectorQuantizer]", iter(self.levels))

    def forward(self, latents: Tensor) -> QuantizerOutput:
        rest, total, indices, commitments = upcast(latents), torch.zeros_like(upcast(latents)), [], []
        for level in self._levels:
            found = level(rest)
            chosen = found.quantized.detach()
            total, rest = total + chosen, rest - chosen
            indices.append(found.indices)
            commitments.append(found.losses["commitment"])
        if self.config.gradient == "rotation":
            quantized = as_maps(rotate_gradient(as_vectors(upcast(latents)), as_vectors(total)), latents)
        else:
            quantized = latents + (total - latents).detach().to(latents.dtype)
        return QuantizerOutput(quantized, torch.stack(indices, 1), {"commitment": torch.stack(commitments).mean()})

    def quantize(self, latents: Tensor) -> Tensor:
        """(B, depth, h, w)."""
        rest, indices = upcast(latents), []
        for level in self._levels:
            indices.append(level.quantize(rest))
            rest = rest - level.lookup(indices[-1])
        return torch.stack(indices, 1)

    def lookup(self, indices: Tensor) -> Tensor:
        return torch.stack([level.lookup(of) for level, of in zip(self._levels, indices.unbind(1), strict=True)]).sum(0)
