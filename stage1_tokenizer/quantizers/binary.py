r"""Codes of signs: a bit a channel, K = 2^c, and no codebook to search.

    LFQ    ẑ_i = sign(z_i)                                     Yu et al. 2023, arXiv 2310.05737, section 3
    BSQ    u = z / ‖z‖,   ẑ_i = sign(u_i) / √c                 Zhao, Xiong, Krähenbühl 2024, arXiv 2406.07548, section 4
    index = Σ_i 2^i [ẑ_i > 0],    p(bit i | z) = σ(s z_i / τ)

    entropy = E_z H(p(· | z)) − H(E_z p(· | z))                each code sure of itself, and all codes used

With p of independent bits the first is a sum over channels. The second is over all 2^c codes for LFQ: the mean of products
over bits, which is a matrix product of two halves of them, so that memory is N √K + K and not N K. BSQ takes the sum over
channels of the mean bit's entropy, an upper bound. Both hold the latents to their codes, by the commitment term.
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
    """H of bits that are 1 with probability σ(logits), in nats, elementwise."""
    return F.softplus(logits) - logits * logits.sigmoid()


def entropy_of(probabilities: Tensor) -> Tensor:
    """−Σ p log p over all entries."""
    return -torch.special.xlogy(probabilities, probabilities).sum()


def code_probabilities(bits: Tensor) -> Tensor:
    """(N, c) probabilities of bits → (2^c,) mean over N of each code's, in the order of the indices."""
    low, high = bits[:, : bits.shape[1] // 2], bits[:, bits.shape[1] // 2 :]
    return (_products(high).T @ _products(low)).flatten() / len(bits)


def _products(bits: Tensor) -> Tensor:
    """(N, c) → (N, 2^c): the probability of each combination of bits, the first bit counting least."""
    found = bits.new_ones(len(bits), 1)
    for bit in bits.unbind(1):
        found = torch.cat([found * (1 - bit)[:, None], found * bit[:, None]], 1)
    return found


@dataclass(frozen=True, kw_only=True)
class BinaryQuantizerConfig(EntropyQuantizerConfig):
    def check(self, codebook_size: int, channels: int) -> None:
        super().check(codebook_size, channels)
        if codebook_size != 2**channels:
            bits = max(1, round(math.log2(codebook_size)))
            raise ConfigError(
                f"model.codebook_size is {codebook_size} and model.latent_channels {channels}; expected 2^channels codes, a bit "
                f"a channel, for {self.name}: {2**bits} and {bits}"
            )


@dataclass(frozen=True, kw_only=True)
class LFQConfig(BinaryQuantizerConfig):
    name: Literal["lfq"] = "lfq"


@dataclass(frozen=True, kw_only=True)
class BSQConfig(BinaryQuantizerConfig):
    name: Literal["bsq"] = "bsq"


class LFQ(Quantizer):
    config: BinaryQuantizerConfig
    sharpness = 4.0  # the squared distances to the two signs differ by 4 z

    def forward(self, latents: Tensor) -> QuantizerOutput:
        with torch.autocast(latents.device.type, enabled=False):
            vectors = self._placed(upcast(as_vectors(latents)))
            codes = torch.where(vectors.detach() > 0, self._length, -self._length)
            logits = self.sharpness * vectors / self.config.entropy_temperature
            entropy = binary_entropy(logits).sum(1).mean() - self._entropy_of_all(logits.sigmoid())
            losses = {"commitment": F.mse_loss(vectors, codes), "entropy": entropy}
            quantized = vectors + (codes - vectors).detach()
        return QuantizerOutput(as_maps(quantized, latents), self.quantize(latents), losses)

    def quantize(self, latents: Tensor) -> Tensor:
        return ((latents > 0) * self._weights(latents.device)).sum(1)

    def lookup(self, indices: Tensor) -> Tensor:
        bits = indices.unsqueeze(1) // self._weights(indices.device) % 2
        return (2.0 * bits - 1) * self._length

    def _entropy_of_all(self, bits: Tensor) -> Tensor:
        return entropy_of(all_reduce_mean(code_probabilities(bits)))

    def _placed(self, vectors: Tensor) -> Tensor:
        return vectors

    @property
    def _length(self) -> float:
        """Of a coordinate of a code."""
        return 1.0

    def _weights(self, device: torch.device) -> Tensor:
        return 2 ** torch.arange(self.channels, device=device).view(-1, 1, 1)


class BSQ(LFQ):
    sharpness = 2.0

    def _placed(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=1)

    @property
    def _length(self) -> float:
        return self.channels**-0.5

    def _entropy_of_all(self, bits: Tensor) -> Tensor:
        mean = all_reduce_mean(bits.mean(0))
        return entropy_of(mean) + entropy_of(1 - mean)
