r"""Vector quantisation: each latent vector becomes the nearest entry of a learnt codebook.

    k(z) = argmin_k ‖z − e_k‖²,    ẑ = z + sg[e_k(z) − z]    (straight-through: ∂ẑ/∂z is the identity)
    L = ‖sg[z] − e‖² + β ‖z − sg[e]‖²

β weighs the commitment term, where the gradient reaches the encoder alone. van den Oord, Vinyals, Kavukcuoglu 2017,
arXiv 1711.00937, eq. 1 to 3. Entries that few vectors choose are restarted from vectors of the current batch
(Dhariwal et al. 2020, arXiv 2005.00341, section 3); before the first batch every entry counts as one.

With `normalize` z and e are divided by their lengths first (Yu et al. 2021, arXiv 2110.04627; Sun et al. 2024, arXiv
2406.06525). With the rotation trick (Fifty et al. 2024, arXiv 2410.06424, section 4.2) the gradient is that of

    ẑ = λ R z,    λ = ‖e‖ / ‖z‖,    R = I − 2 r rᵀ + 2 ê ẑᵀ,    r = (ẑ + ê) / ‖ẑ + ê‖    with λ and R held, hats of length 1
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

CHUNK_ELEMENTS = 1 << 21  # entries of the distance table that exist at once: 8 MiB of float32


def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest codebook entry, the first of equals.

    Args:     vectors (N, D), codebook (K, D).
    Returns:  (N,) int64 in [0, K).
    The constant ‖z‖² is left out of the distance.
    """
    return least_of(vectors, codebook, upcast(codebook).square().sum(1))


@torch.compiler.disable  # it works in place, and on settings that a compiler does not see
@torch.no_grad()
def least_of(vectors: Tensor, codebook: Tensor, offsets: Tensor) -> Tensor:
    """argmin_k o_k − 2 z · e_k for vectors (N, D), codebook (K, D) and offsets (K,): (N,) int64.

    N is cut in chunks that share one table, so that memory is O(chunk) and not N × K. Float32 under autocast and where products
    are rounded: in bfloat16 the distances tie and most vectors fall on one code.
    """
    device = vectors.device
    with torch.autocast(device.type, enabled=False), full_matmul_precision(device):
        vectors, codebook = upcast(vectors), upcast(codebook)
        rows = max(1, CHUNK_ELEMENTS // len(codebook))
        table = vectors.new_empty(min(rows, len(vectors)), len(codebook))
        least, indices = vectors.new_empty(len(vectors)), torch.empty(len(vectors), dtype=torch.int64, device=device)
        for chunk, *found in zip(*(part.split(rows) for part in (vectors, least, indices)), strict=True):
            torch.addmm(offsets, chunk, codebook.T, alpha=-2, out=table[: len(chunk)])
            torch.min(table[: len(chunk)], 1, out=tuple(found))  # on CPUs twice as fast as argmin
        return indices


def rotate_gradient(vectors: Tensor, codes: Tensor) -> Tensor:
    """(N, D) codes through which the gradient reaches the vectors as through the rotation that takes one to the other."""
    unit, target = F.normalize(vectors.detach(), dim=1), F.normalize(codes.detach(), dim=1)
    between = F.normalize(unit + target, dim=1)
    scale = codes.detach().norm(dim=1, keepdim=True) / vectors.detach().norm(dim=1, keepdim=True).clamp(min=1e-6)

    def along(direction: Tensor) -> Tensor:
        return (vectors * direction).sum(1, keepdim=True)

    rotated = scale * (vectors - 2 * along(between) * between + 2 * along(unit) * target)
    return rotated + (codes - rotated).detach()  # the code itself: rounding would leave a little of the rotation


@dataclass(frozen=True, kw_only=True)
class CodebookConfig(QuantizerConfig):
    """Of a codebook whose entries restart, may lie on the sphere, and may pass the gradient by rotation."""

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

    def __post_init__(self) -> None:
        if not 0 <= self.usage_decay < 1 or self.restart_threshold < 0:
            raise ConfigError(
                f"model.quantizer.usage_decay is {self.usage_decay} and restart_threshold {self.restart_threshold}; expected "
                "a share in [0, 1) and 0 or more"
            )
        if self.kmeans_iterations < 0:
            raise ConfigError(f"model.quantizer.kmeans_iterations is {self.kmeans_iterations}; expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class VectorQuantizerConfig(CodebookConfig):
    name: Literal["vq"] = "vq"


class VectorQuantizer(Quantizer):
    """A codebook learnt by gradient."""

    config: CodebookConfig
    codebook: Tensor
    usage: Tensor
    restarts: Tensor

    def __init__(self, config: CodebookConfig, codebook_size: int, channels: int) -> None:
        super().__init__(config, codebook_size, channels)
        self._make_codebook(torch.randn(codebook_size, channels))
        self.register_buffer("usage", torch.zeros(codebook_size))  # vectors a step and entry, moving average
        self.register_buffer("restarts", torch.zeros((), dtype=torch.int64))  # batches that gave dead entries vectors

    def _make_codebook(self, initial: Tensor) -> None:
        self.codebook = nn.Parameter(initial)

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """latents: (B, c, h, w); in training mode also learns, and restarts dead entries."""
        batch, _, height, width = latents.shape
        with torch.autocast(latents.device.type, enabled=False):
            vectors = self._placed(upcast(as_vectors(latents)))  # (N, c)
            learning = self.training and all_finite(vectors)  # or one bad batch would stay in the moving averages
            if learning:
                self._restart(vectors.detach())
            codebook = self._placed(self.codebook)
            indices = nearest_code(vectors.detach(), codebook.detach())
            chosen = F.embedding(indices, codebook)
            losses = (
                {"codebook": F.mse_loss(chosen, vectors.detach())} if isinstance(self.codebook, nn.Parameter) else {}
            )
            losses["commitment"] = F.mse_loss(vectors, chosen.detach())
            if learning:
                self._count(indices, vectors.detach())
            if self.config.gradient == "rotation":
                quantized = rotate_gradient(vectors, chosen.detach())
            else:
                quantized = vectors + (chosen - vectors).detach()
        return QuantizerOutput(as_maps(quantized, latents), indices.view(batch, height, width), losses)

    def quantize(self, latents: Tensor) -> Tensor:
        batch, _, height, width = latents.shape
        vectors = self._placed(upcast(as_vectors(latents)))
        return nearest_code(vectors, self._placed(self.codebook)).view(batch, height, width)

    def lookup(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self._placed(self.codebook)).movedim(-1, 1)

    def _placed(self, vectors: Tensor) -> Tensor:
        """On the unit sphere, where the configuration says so."""
        return F.normalize(vectors, dim=1) if self.config.normalize else vectors

    @torch.no_grad()
    def _count(self, indices: Tensor, vectors: Tensor) -> None:
        counts = all_reduce_sum(torch.bincount(indices, minlength=len(self.usage)).to(self.usage.dtype))
        self.usage.lerp_(counts, 1 - self.config.usage_decay)

    @torch.no_grad()
    def _restart(self, vectors: Tensor) -> None:
        """Gives every dead entry a vector of all processes' batches; all see the same usage and take the same vectors."""
        threshold, first = self.config.restart_threshold, not self.usage.any()
        if threshold == 0 and not first:
            return
        uniform = float(all_reduce_sum(vectors.new_tensor(len(vectors)))) / len(self.usage)
        dead = self.usage <= threshold * uniform
        if not dead.any():
            return
        candidates = all_gather(vectors)
        self.restarts += 1
        # one draw for all processes, whatever their number
        generator = torch.Generator().manual_seed(int(self.restarts))
        if len(candidates) >= len(self.usage):  # each once: of two entries that are the same one is never chosen
            chosen = torch.randperm(len(candidates), generator=generator)[: len(self.usage)]
        else:
            chosen = torch.randint(len(candidates), (len(self.usage),), generator=generator)
        entries = candidates[chosen.to(vectors.device)]
        if first:
            entries = kmeans(candidates, entries, self.config.kmeans_iterations)
        self._replace(dead, entries, uniform)

    def _replace(self, dead: Tensor, candidates: Tensor, usage: float) -> None:
        self.codebook.data.copy_(torch.where(dead[:, None], candidates.to(self.codebook.dtype), self.codebook.data))
        self.usage.copy_(torch.where(dead, usage, self.usage))


def kmeans(vectors: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """Lloyd's algorithm: (K, D) centres after so many iterations on vectors (N, D); one that none is nearest to stays."""
    for _ in range(iterations):
        nearest = nearest_code(vectors, centres)
        counts = torch.bincount(nearest, minlength=len(centres)).to(vectors.dtype)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres
