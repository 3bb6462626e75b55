r"""Vector quantization: each latent vector is replaced by the nearest entry of a learned codebook.

    k(z) = argmin_k ‖z − e_k‖²,    ẑ = z + sg[e_k(z) − z]    (straight-through: ∂ẑ/∂z is the identity)
    L = ‖sg[z] − e‖² + β ‖z − sg[e]‖²

β weights the commitment term. Its gradient reaches the encoder only. van den Oord, Vinyals, Kavukcuoglu 2017,
arXiv 1711.00937, eq. 1 to 3. An entry with few assigned vectors is dead, and is restarted from a vector of the current batch
(Dhariwal et al. 2020, arXiv 2005.00341, section 3). Before the first batch every entry is dead.

With `normalize`, z and e are first divided by their norms (Yu et al. 2021, arXiv 2110.04627; Sun et al. 2024, arXiv
2406.06525). With the rotation trick (Fifty et al. 2024, arXiv 2410.06424, section 4.2) the backward pass uses the gradient of

    ẑ = λ R z,    λ = ‖e‖ / ‖z‖,    R = I − 2 r rᵀ + 2 ê ûᵀ,    r = (û + ê) / ‖û + ê‖,    û = z / ‖z‖,    ê = e / ‖e‖

with λ and R constant.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.quantizers.protocol import (
    Quantizer,
    QuantizerConfig,
    QuantizerOutput,
    all_finite,
    all_gather,
    all_reduce_sum,
    as_maps,
    as_vectors,
)
from training_harness.errors import ConfigError
from training_harness.matmul_precision import full_matmul_precision
from training_harness.precision import upcast

CHUNK_ELEMENTS = 1 << 21  # size of the distance table of one chunk: 8 MiB of float32


def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Find the index of the nearest codebook entry, the smallest index on ties.

    Args:     vectors (N, D), codebook (K, D).
    Returns:  (N,) int64 in [0, K).
    """
    return chunked_argmin(vectors, codebook, upcast(codebook).square().sum(1))  # ‖z − e‖² without its constant ‖z‖²


@torch.compiler.disable  # it writes in place and changes settings that the compiler does not see
@torch.no_grad()
def chunked_argmin(vectors: Tensor, codebook: Tensor, offsets: Tensor) -> Tensor:
    """Compute argmin_k o_k − 2 z · e_k for vectors (N, D), codebook (K, D) and offsets (K,), as (N,) int64.

    The vectors are processed in chunks that share one table, so memory is O(chunk) instead of N × K. The products are float32
    also under autocast and reduced matmul precision: in bfloat16 the distances tie and most vectors get the same code.
    """
    device = vectors.device
    with torch.autocast(device.type, enabled=False), full_matmul_precision(device):
        vectors, codebook = upcast(vectors), upcast(codebook)
        chunk_rows = max(1, CHUNK_ELEMENTS // len(codebook))
        table = vectors.new_empty(min(chunk_rows, len(vectors)), len(codebook))
        minima, indices = vectors.new_empty(len(vectors)), torch.empty(len(vectors), dtype=torch.int64, device=device)
        for chunk, *outputs in zip(*(rows.split(chunk_rows) for rows in (vectors, minima, indices)), strict=True):
            torch.addmm(offsets, chunk, codebook.T, alpha=-2, out=table[: len(chunk)])
            torch.min(table[: len(chunk)], 1, out=tuple(outputs))  # on CPUs twice as fast as argmin
        return indices


def rotate_gradient(vectors: Tensor, codes: Tensor) -> Tensor:
    """Return the codes (N, D), with the gradient of the rotation and scaling that map each vector to its code."""
    unit, target = F.normalize(vectors.detach(), dim=1), F.normalize(codes.detach(), dim=1)  # û and ê
    bisector = F.normalize(unit + target, dim=1)  # r
    scale = codes.detach().norm(dim=1, keepdim=True) / vectors.detach().norm(dim=1, keepdim=True).clamp(min=1e-6)

    def component(direction: Tensor) -> Tensor:
        return (vectors * direction).sum(1, keepdim=True)

    rotated = scale * (vectors - 2 * component(bisector) * bisector + 2 * component(unit) * target)
    return rotated + (codes - rotated).detach()  # exactly the code, without the rounding error of the rotation


@dataclass(frozen=True, kw_only=True)
class CodebookConfig(QuantizerConfig):
    """Options of the codebooks that restart dead codes."""

    usage_decay: float = 0.95
    """Decay of the moving average of each code's usage, and of the `ema` codebook itself; in [0, 1)."""
    restart_threshold: float = 0.3
    """Restart codes that are used less often than this share of the uniform rate; 0 disables restarts."""
    kmeans_iterations: int = 0
    """k-means iterations on the first batch to initialize the codebook; 0 initializes it with vectors of the batch."""
    normalize: bool = False
    """Project latents and codes to the unit sphere, as in ViT-VQGAN and LlamaGen."""
    gradient: Literal["straight-through", "rotation"] = "straight-through"
    """Gradient of the quantized latents: copied to the latents, or passed through the rotation trick."""

    def __post_init__(self) -> None:
        if not 0 <= self.usage_decay < 1 or self.restart_threshold < 0:
            raise ConfigError(
                f"model.quantizer.usage_decay is {self.usage_decay} and restart_threshold is {self.restart_threshold}; expected "
                "a decay in [0, 1) and a threshold of 0 or more"
            )
        if self.kmeans_iterations < 0:
            raise ConfigError(f"model.quantizer.kmeans_iterations is {self.kmeans_iterations}; expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class VectorQuantizerConfig(CodebookConfig):
    name: Literal["vq"] = "vq"


class VectorQuantizer(Quantizer):
    """A codebook that is learned by gradient descent."""

    config: CodebookConfig
    codebook: Tensor
    usage: Tensor
    restarts: Tensor

    def __init__(self, config: CodebookConfig, codebook_size: int, channels: int) -> None:
        super().__init__(config, codebook_size, channels)
        self._create_codebook(torch.randn(codebook_size, channels))
        self.register_buffer(
            "usage", torch.zeros(codebook_size)
        )  # moving average of the vectors per step of each entry
        self.register_buffer("restarts", torch.zeros((), dtype=torch.int64))  # number of steps that restarted entries

    def _create_codebook(self, initial: Tensor) -> None:
        self.codebook = nn.Parameter(initial)

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize latents (B, c, h, w); in training mode also update the usage and restart dead entries."""
        batch, _, height, width = latents.shape
        with torch.autocast(latents.device.type, enabled=False):
            vectors = self._project(upcast(as_vectors(latents)))  # (N, c)
            update = self.training and all_finite(vectors)  # a bad batch would spoil the moving averages for good
            if update:
                self._restart_dead_entries(vectors.detach())
            codebook = self._project(self.codebook)
            indices = nearest_code(vectors.detach(), codebook.detach())
            codes = F.embedding(indices, codebook)
            losses = (
                {"codebook": F.mse_loss(codes, vectors.detach())} if isinstance(self.codebook, nn.Parameter) else {}
            )
            losses["commitment"] = F.mse_loss(vectors, codes.detach())
            if update:
                self._update_usage(indices, vectors.detach())
            if self.config.gradient == "rotation":
                quantized = rotate_gradient(vectors, codes.detach())
            else:
                quantized = vectors + (codes - vectors).detach()
        return QuantizerOutput(as_maps(quantized, latents), indices.view(batch, height, width), losses)

    def quantize(self, latents: Tensor) -> Tensor:
        batch, _, height, width = latents.shape
        vectors = self._project(upcast(as_vectors(latents)))
        return nearest_code(vectors, self._project(self.codebook)).view(batch, height, width)

    def lookup(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self._project(self.codebook)).movedim(-1, 1)

    def _project(self, vectors: Tensor) -> Tensor:
        """Project vectors (N, D) to the unit sphere if `normalize` is set."""
        return F.normalize(vectors, dim=1) if self.config.normalize else vectors

    @torch.no_grad()
    def _update_usage(self, indices: Tensor, vectors: Tensor) -> None:
        counts = all_reduce_sum(torch.bincount(indices, minlength=len(self.usage)).to(self.usage.dtype))
        self.usage.lerp_(counts, 1 - self.config.usage_decay)

    @torch.no_grad()
    def _restart_dead_entries(self, vectors: Tensor) -> None:
        """Replace dead entries by vectors from the batches of all processes; every process takes the same vectors."""
        threshold, first_batch = self.config.restart_threshold, not self.usage.any()
        if threshold == 0 and not first_batch:
            return
        uniform = float(all_reduce_sum(vectors.new_tensor(len(vectors)))) / len(self.usage)
        dead = self.usage <= threshold * uniform
        if not dead.any():
            return
        candidates = all_gather(vectors)
        self.restarts += 1
        # The same seed on every process, so that all processes select the same rows.
        generator = torch.Generator().manual_seed(int(self.restarts))
        if len(candidates) >= len(self.usage):  # without repetition: of two equal entries the second is never used
            selected = torch.randperm(len(candidates), generator=generator)[: len(self.usage)]
        else:
            selected = torch.randint(len(candidates), (len(self.usage),), generator=generator)
        entries = candidates[selected.to(vectors.device)]
        if first_batch:
            entries = kmeans(candidates, entries, self.config.kmeans_iterations)
        self._replace_entries(dead, entries, uniform)

    def _replace_entries(self, dead: Tensor, entries: Tensor, usage: float) -> None:
        """Replace codebook rows by rows of `entries` (K, D) where `dead`, (K,) bool, is True, and reset their usage."""
        self.codebook.data.copy_(torch.where(dead[:, None], entries.to(self.codebook.dtype), self.codebook.data))
        self.usage.copy_(torch.where(dead, usage, self.usage))


def kmeans(vectors: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """Refine centres (K, D) by Lloyd's algorithm on vectors (N, D); a centre without vectors does not move."""
    for _ in range(iterations):
        nearest = nearest_code(vectors, centres)
        counts = torch.bincount(nearest, minlength=len(centres)).to(vectors.dtype)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres
