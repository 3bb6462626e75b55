r"""Residual quantisation: several codes a position, each of what the ones before leave over.

    r_0 = z,    ẑ_i = e^{(i)}_{k_i},    r_{i+1} = r_i − sg[ẑ_i],    ẑ = Σ_i ẑ_i

Lee et al. 2022, arXiv 2203.01941; Zeghidour et al. 2021, arXiv 2107.03312, with a codebook of moving averages for each level.
The loss terms are means over levels. The gradient of ẑ passes to z as in plain vector quantisation.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from stage1_tokenizer.quantizers.ema_quantizer import EMAVectorQuantizer
from stage1_tokenizer.quantizers.protocol import Quantizer, QuantizerConfig, QuantizerOutput, as_maps, as_vectors
from stage1_tokenizer.quantizers.vector_quantizer import turned
from training_harness.precision import widened


class ResidualQuantizer(Quantizer):
    def __init__(self, config: QuantizerConfig, codebook_size: int, channels: int) -> None:
        super().__init__(config, codebook_size, channels)
        self.depth = config.depth
        inner = replace(config, name="ema", gradient="straight-through")
        self.levels = nn.ModuleList(EMAVectorQuantizer(inner, codebook_size, channels) for _ in range(config.depth))

    @property
    def _levels(self) -> Iterator[EMAVectorQuantizer]:
        return cast("Iterator[EMAVectorQuantizer]", iter(self.levels))

    def forward(self, latents: Tensor) -> QuantizerOutput:
        rest, total, indices, commitments = widened(latents), torch.zeros_like(widened(latents)), [], []
        for level in self._levels:
            found = level(rest)
            chosen = found.quantized.detach()
            total, rest = total + chosen, rest - chosen
            indices.append(found.indices)
            commitments.append(found.losses["commitment"])
        if self.config.gradient == "rotation":
            quantized = as_maps(turned(as_vectors(widened(latents)), as_vectors(total)), latents)
        else:
            quantized = latents + (total - latents).detach().to(latents.dtype)
        return QuantizerOutput(quantized, torch.stack(indices, 1), {"commitment": torch.stack(commitments).mean()})

    def quantize(self, latents: Tensor) -> Tensor:
        """(B, depth, h, w)."""
        rest, indices = widened(latents), []
        for level in self._levels:
            indices.append(level.quantize(rest))
            rest = rest - level.lookup(indices[-1])
        return torch.stack(indices, 1)

    def lookup(self, indices: Tensor) -> Tensor:
        return torch.stack([level.lookup(of) for level, of in zip(self._levels, indices.unbind(1), strict=True)]).sum(0)
