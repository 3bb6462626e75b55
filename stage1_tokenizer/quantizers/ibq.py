r"""Index backpropagation quantization (IBQ): the gradient of a soft assignment reaches every code.

    a = softmax(z Eᵀ / τ),    hard = onehot(argmax a),    ẑ = (hard + a − sg[a]) E
    L = ‖sg[z] − e‖² + β ‖z − sg[e]‖² as in vector quantization, plus the entropy term of LFQ on a

Shi et al. 2024, arXiv 2412.02692, section 3. With g = ∂L/∂ẑ the gradient is

    ∂L/∂E = hardᵀ g + dᵀ z / τ,    ∂L/∂z = d E / τ,    d = a ⊙ (g Eᵀ − (a ⊙ g Eᵀ) 1 1ᵀ)

The backward pass recomputes a in chunks of N, so memory is O(chunk) instead of N × K.
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
from stage1_tokenizer.quantizers.vector_quantizer import CHUNK_ELEMENTS, chunked_argmin
from training_harness.precision import upcast


def most_similar_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return the index (N,) of the code with the largest inner product with each vector (N, D)."""
    return chunked_argmin(vectors, codebook, codebook.new_zeros(len(codebook)))


class _SoftLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, codebook: Tensor, indices: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(vectors, codebook, indices)
        ctx.temperature = temperature
        return codebook[indices]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        vectors, codebook, indices = ctx.saved_tensors
        chunk_rows, grad_vectors = max(1, CHUNK_ELEMENTS // len(codebook)), []
        grad_codebook = torch.zeros_like(codebook).index_add_(0, indices, gradients[0])
        for chunk, gradient in zip(vectors.split(chunk_rows), gradients[0].split(chunk_rows), strict=True):
            assignment = (chunk @ codebook.T / ctx.temperature).softmax(1)
            grad_assignment = gradient @ codebook.T
            mean = (assignment * grad_assignment).sum(1, keepdim=True)
            grad_logits = assignment * (grad_assignment - mean) / ctx.temperature
            grad_vectors.append(grad_logits @ codebook)
            grad_codebook += grad_logits.T @ chunk
        return torch.cat(grad_vectors), grad_codebook, None, None


@torch.compiler.disable  # the compiler of torch 2.11 loses the gradient of a custom autograd function like this one
def soft_lookup(vectors: Tensor, codebook: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """Return the codes (N, D) of indices (N,), with the gradient of the soft assignment to all codes."""
    return _SoftLookup.apply(vectors, codebook, indices, temperature)


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
            indices = most_similar_code(vectors.detach(), self.codebook.detach())
            quantized = soft_lookup(vectors, self.codebook, indices, self.config.entropy_temperature)
            codes = self.codebook[indices]
            losses = {
                "codebook": F.mse_loss(codes, vectors.detach()),
                "commitment": F.mse_loss(vectors, codes.detach()),
                "entropy": self._entropy_loss(vectors),
            }
        return QuantizerOutput(as_maps(quantized, latents), indices.view(batch, height, width), losses)

    def quantize(self, latents: Tensor) -> Tensor:
        batch, _, height, width = latents.shape
        return most_similar_code(upcast(as_vectors(latents)), self.codebook).view(batch, height, width)

    def lookup(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codebook).movedim(-1, 1)

    def _entropy_loss(self, vectors: Tensor) -> Tensor:
        chunk_rows = max(1, CHUNK_ELEMENTS // self.codebook_size)
        if len(vectors) <= chunk_rows:
            entropy_sum, assignment_sum = self._sum_assignments(vectors)
        else:
            chunks = [
                checkpoint(self._sum_assignments, chunk, use_reentrant=False) for chunk in vectors.split(chunk_rows)
            ]
            entropy_sum, assignment_sum = (torch.stack(sums).sum(0) for sums in zip(*chunks, strict=True))
        mean = all_reduce_mean(assignment_sum / len(vectors))
        return entropy_sum / len(vectors) + torch.special.xlogy(mean, mean).sum()

    def _sum_assignments(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Compute Σ H(a), a scalar, and Σ a, (K,), over the vectors (N, D)."""
        log_assignment = (vectors @ self.codebook.T / self.config.entropy_temperature).log_softmax(1)
        assignment = log_assignment.exp()
        return -(assignment * log_assignment).sum(), assignment.sum(0)
