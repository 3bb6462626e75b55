r"""SimVQ: a frozen random codebook and one learned linear layer, so that each step moves every code.

    e_k = c_k W,    c_k ~ N(0, 1/D) fixed,    ẑ and L as in plain vector quantization

Zhu et al. 2024, arXiv 2411.02038, section 4. All codes share W, so no code stops learning and no code needs a restart.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.quantizers.protocol import Quantizer, QuantizerConfig, QuantizerOutput, as_maps, as_vectors
from stage1_tokenizer.quantizers.vector_quantizer import nearest_code
from training_harness.precision import upcast


@dataclass(frozen=True, kw_only=True)
class SimVQConfig(QuantizerConfig):
    name: Literal["simvq"] = "simvq"


class SimVQ(Quantizer):
    frozen: Tensor

    def __init__(self, config: SimVQConfig, codebook_size: int, channels: int) -> None:
        super().__init__(config, codebook_size, channels)
        self.register_buffer("frozen", torch.randn(codebook_size, channels) * channels**-0.5)
        self.basis = nn.Parameter(torch.randn(channels, channels) * channels**-0.5)

    @property
    def codebook(self) -> Tensor:
        """Codebook (K, D) with gradients to the linear layer, in float32 also under autocast."""
        with torch.autocast(self.frozen.device.type, enabled=False):
            return self.frozen @ self.basis

    def forward(self, latents: Tensor) -> QuantizerOutput:
        batch, _, height, width = latents.shape
        with torch.autocast(latents.device.type, enabled=False):
            vectors, codebook = upcast(as_vectors(latents)), self.codebook
            indices = nearest_code(vectors.detach(), codebook.detach())
            codes = F.embedding(indices, codebook)
            losses = {
                "codebook": F.mse_loss(codes, vectors.detach()),
                "commitment": F.mse_loss(vectors, codes.detach()),
            }
            quantized = vectors + (codes - vectors).detach()
        return QuantizerOutput(as_maps(quantized, latents), indices.view(batch, height, width), losses)

    def quantize(self, latents: Tensor) -> Tensor:
        batch, _, height, width = latents.shape
        return nearest_code(as_vectors(latents), self.codebook).view(batch, height, width)

    def lookup(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codebook).movedim(-1, 1)
