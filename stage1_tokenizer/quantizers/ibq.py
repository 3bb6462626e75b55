r"""Index backpropagation: the gradient of a choice reaches every code that it might have been.

    a = softmax(z Eᵀ / τ),    hard = onehot(argmax a),    ẑ = (hard + a − sg[a]) E
    L = ‖sg[z] − ẑ‖² + ‖ẑ − …‖² as in vector quantisation, and the entropy term of lookup-free codes on a

Shi et al. 2024, arXiv 2412.02692, section 3. Written out, with g = ∂L/∂ẑ, the gradient is

    ∂L/∂E = hardᵀ g + dᵀ z / τ,    ∂L/∂z = d E / τ,    d = a ⊙ (g Eᵀ − (a ⊙ g Eᵀ) 1 1ᵀ)

which is computed in chunks of N, the choice anew, so that memory is O(chunk) and not N × K.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stage1_tokenizer.quantizers.protocol import (
    EntropyQuantizerConfig,
    Quantizer,
    QuantizerOutput,
    all_reduce_mean,
    as_maps,
    as_vectors,
)
from stage1_tokenizer.quantizers.vector_quantizer import CHUNK_ELEMENTS, least_of
from training_harness.precision import upcast


def most_alike(vectors: Tensor, codebook: Tensor) -> Tensor:
    """(N,) index of the code with the largest product with each vector."""
    return least_of(vectors, codebook, codebook.new_zeros(len(codebook)))


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, codebook: Tensor, indices: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(vectors, codebook, indices)
        ctx.temperature = temperature
        return codebook[indices]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        vectors, codebook, indices = ctx.saved_tensors
        rows, of_vectors = max(1, CHUNK_ELEMENTS // len(codebook)), []
        of_codebook = torch.zeros_like(codebook).index_add_(0, indices, gradients[0])
        for chunk, gradient in zip(vectors.split(rows), gradients[0].split(rows), strict=True):
            choice = (chunk @ codebook.T / ctx.temperature).softmax(1)
            of_choice = gradient @ codebook.T
            shifted = choice * (of_choice - (choice * of_choice).sum(1, keepdim=True)) / ctx.temperature
            of_vectors.append(shifted @ codebook)
            of_codebook += shifted.T @ chunk
        return torch.cat(of_vectors), of_codebook, None, None


@torch.compiler.disable  # that of torch 2.11 loses the gradient of such a function
def soft_choice(vectors: Tensor, codebook: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """Codes (N, D) of indices (N,), with the gradient of the soft choice among all."""
    return _Chosen.apply(vectors, codebook, indices, temperature)


@dataclass(frozen=True, kw_only=True)
class IBQConfig(EntropyQuantizerConfig):
    name: Literal["ibq"] = "ibq"


class IBQ(Quantizer):
    config: IBQConfig

    def __init__(self, config: IBQConfig, codebook_size: int, channels: int) -> None:
        super().__init__(config, codebook_size, channels)
        self.codebook = nn.Parameter(torch.randn(codebook_size, channels) * channels**-0.5)

    def forward(self, latents: Tensor) -> QuantizerOutput:
        batch, _, height, width = latents.shape
        with torch.autocast(latents.device.type, enabled=False):
            vectors = upcast(as_vectors(latents))
            indices = most_alike(vectors.detach(), self.codebook.detach())
            chosen = soft_choice(vectors, self.codebook, indices, self.config.entropy_temperature)
            hard = self.codebook[indices]
            losses = {
                "codebook": F.mse_loss(hard, vectors.detach()),
                "commitment": F.mse_loss(vectors, hard.detach()),
                "entropy": self._entropy(vectors),
            }
        return QuantizerOutput(as_maps(chosen, latents), indices.view(batch, height, width), losses)

    def quantize(self, latents: Tensor) -> Tensor:
        batch, _, height, width = latents.shape
        return most_alike(upcast(as_vectors(latents)), self.codebook).view(batch, height, width)

    def lookup(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codebook).movedim(-1, 1)

    def _entropy(self, vectors: Tensor) -> Tensor:
        rows = max(1, CHUNK_ELEMENTS // self.codebook_size)
        if len(vectors) <= rows:
            own, choice = self._choices(vectors)
        else:
            parts = [checkpoint(self._choices, chunk, use_reentrant=False) for chunk in vectors.split(rows)]
            own, choice = (torch.stack(sums).sum(0) for sums in zip(*parts, strict=True))
        mean = all_reduce_mean(choice / len(vectors))
        return own / len(vectors) + torch.special.xlogy(mean, mean).sum()

    def _choices(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Σ H(a), and Σ a (K,), over vectors (N, D)."""
        logs = (vectors @ self.codebook.T / self.config.entropy_temperature).log_softmax(1)
        choice = logs.exp()
        return -(choice * logs).sum(), choice.sum(0)
