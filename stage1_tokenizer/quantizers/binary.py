r"""Binary quantization: each channel gives one bit, K = 2^c, and there is no codebook to search.

    LFQ    ẑ_i = sign(z_i)                                     Yu et al. 2023, arXiv 2310.05737, section 3
    BSQ    u = z / ‖z‖,   ẑ_i = sign(u_i) / √c                 Zhao, Xiong, Krähenbühl 2024, arXiv 2406.07548, section 4
    index = Σ_i 2^i [ẑ_i > 0],    p(bit i | z) = σ(s z_i / τ)

    entropy = E_z H(p(· | z)) − H(E_z p(· | z))                confident assignments, and all codes used

The bits are independent, so the first entropy is a sum over channels. For LFQ the second entropy is over all 2^c codes. Their
mean probabilities are a matrix product of the two halves of the bits, so memory is N √K + K instead of N K. BSQ sums the
entropies of the mean bits, which is an upper bound. In both, the commitment term keeps the latents close to their codes.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.quantizers.protocol import (
    EntropyQuantizerConfig,
    Quantizer,
    QuantizerOutput,
    all_reduce_mean,
    as_maps,
    as_vectors,
)
from training_harness.errors import ConfigError
from training_harness.precision import upcast


def binary_entropy(logits: Tensor) -> Tensor:
    """Compute the entropy in nats of each bit, given the logits of its probability to be 1."""
    return F.softplus(logits) - logits * logits.sigmoid()


def sum_entropy(probabilities: Tensor) -> Tensor:
    """Compute −Σ p log p over all entries, in nats."""
    return -torch.special.xlogy(probabilities, probabilities).sum()


def code_probabilities(bits: Tensor) -> Tensor:
    """Compute the mean probability of each code, (2^c,) in index order, from bit probabilities (N, c)."""
    low, high = bits[:, : bits.shape[1] // 2], bits[:, bits.shape[1] // 2 :]
    return (_combination_probabilities(high).T @ _combination_probabilities(low)).flatten() / len(bits)


def _combination_probabilities(bits: Tensor) -> Tensor:
    """Compute the probability of each combination of bits, (N, c) → (N, 2^c); the first bit is the least significant."""
    products = bits.new_ones(len(bits), 1)
    for bit in bits.unbind(1):
        products = torch.cat([products * (1 - bit)[:, None], products * bit[:, None]], 1)
    return products


@dataclass(frozen=True, kw_only=True)
class BinaryQuantizerConfig(EntropyQuantizerConfig):
    def check(self, codebook_size: int, channels: int) -> None:
        super().check(codebook_size, channels)
        if codebook_size != 2**channels:
            bits = max(1, round(math.log2(codebook_size)))
            raise ConfigError(
                f"model.codebook_size is {codebook_size} and model.latent_channels is {channels}; expected 2^channels codes for "
                f"{self.name}, which has one bit per channel. Use {2**bits} and {bits}"
            )


@dataclass(frozen=True, kw_only=True)
class LFQConfig(BinaryQuantizerConfig):
    name: Literal["lfq"] = "lfq"


@dataclass(frozen=True, kw_only=True)
class BSQConfig(BinaryQuantizerConfig):
    name: Literal["bsq"] = "bsq"


class LFQ(Quantizer):
    config: BinaryQuantizerConfig
    logit_scale = 4.0  # s: the squared distances to the two signs differ by 4 z

    def forward(self, latents: Tensor) -> QuantizerOutput:
        with torch.autocast(latents.device.type, enabled=False):
            vectors = self._project(upcast(as_vectors(latents)))
            codes = torch.where(vectors.detach() > 0, self._magnitude, -self._magnitude)
            logits = self.logit_scale * vectors / self.config.entropy_temperature
            entropy = binary_entropy(logits).sum(1).mean() - self._batch_entropy(logits.sigmoid())
            losses = {"commitment": F.mse_loss(vectors, codes), "entropy": entropy}
            quantized = vectors + (codes - vectors).detach()
        return QuantizerOutput(as_maps(quantized, latents), self.quantize(latents), losses)

    def quantize(self, latents: Tensor) -> Tensor:
        return ((latents > 0) * self._powers_of_two(latents.device)).sum(1)

    def lookup(self, indices: Tensor) -> Tensor:
        bits = indices.unsqueeze(1) // self._powers_of_two(indices.device) % 2
        return (2.0 * bits - 1) * self._magnitude

    def _batch_entropy(self, bits: Tensor) -> Tensor:
        """Compute the entropy of the mean code probabilities from bit probabilities (N, c)."""
        return sum_entropy(all_reduce_mean(code_probabilities(bits)))

    def _project(self, vectors: Tensor) -> Tensor:
        """Map the latent vectors (N, c) to the space of the codes."""
        return vectors

    @property
    def _magnitude(self) -> float:
        """Absolute value of each coordinate of a code."""
        return 1.0

    def _powers_of_two(self, device: torch.device) -> Tensor:
        return 2 ** torch.arange(self.channels, device=device).view(-1, 1, 1)


class BSQ(LFQ):
    logit_scale = 2.0

    def _project(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=1)

    @property
    def _magnitude(self) -> float:
        return self.channels**-0.5

    def _batch_entropy(self, bits: Tensor) -> Tensor:
        mean = all_reduce_mean(bits.mean(0))
        return sum_entropy(mean) + sum_entropy(1 - mean)
