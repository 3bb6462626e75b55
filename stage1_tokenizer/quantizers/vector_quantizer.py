r"""Vector quantisation: each latent vector becomes the nearest entry of a learnt codebook.

    k(z) = argmin_k ‖z − e_k‖²,    ẑ = z + sg[e_k(z) − z]    (straight-through: ∂ẑ/∂z is the identity)
    L = ‖sg[z] − e‖² + β ‖z − sg[e]‖²

β weighs the commitment term, where the gradient reaches the encoder alone. van den Oord, Vinyals, Kavukcuoglu 2017,
arXiv 1711.00937, eq. 1 to 3. Entries that few vectors choose are restarted from vectors of the current batch
(Dhariwal et al. 2020, arXiv 2005.00341, section 3); before the first batch every entry counts as one.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from training_harness.precision import widened

CHUNK_ELEMENTS = 1 << 22  # entries of the distance table that exist at once: 16 MiB of float32


class QuantizerOutput(NamedTuple):
    quantized: Tensor  # (B, c, h, w), straight-through
    indices: Tensor  # (B, h, w) int64 in [0, K)
    codebook_loss: Tensor  # scalar float32, ‖sg[z] − e‖²; a constant where the codebook is no parameter
    commitment_loss: Tensor  # scalar float32, ‖z − sg[e]‖²; β is applied where the terms are summed


def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest codebook entry.

    Args:     vectors (N, D), codebook (K, D).
    Returns:  (N,) int64 in [0, K).
    The constant ‖z‖² is left out, and N is cut in chunks, so that memory is O(chunk) and not N × K. Float32 under
    autocast too: in bfloat16 the distances tie and most vectors fall on one code.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        vectors, codebook = widened(vectors), widened(codebook)
        squares = codebook.square().sum(1)
        rows = max(1, CHUNK_ELEMENTS // len(codebook))
        return torch.cat([torch.addmm(squares, chunk, codebook.T, alpha=-2).argmin(1) for chunk in vectors.split(rows)])


class VectorQuantizer(nn.Module):
    """A codebook learnt by gradient.

    Args:
        codebook_size: K.
        channels: D, the latent channels.
        usage_decay: decay of the moving average of how often each entry is chosen.
        restart_threshold: entries chosen less often than this share of the uniform rate are restarted; 0 never.
    """

    codebook: Tensor
    usage: Tensor
    restarts: Tensor

    def __init__(self, codebook_size: int, channels: int, usage_decay: float = 0.95, restart_threshold: float = 0.3):
        super().__init__()
        self.usage_decay, self.restart_threshold = usage_decay, restart_threshold
        self._make_codebook(torch.randn(codebook_size, channels))
        self.register_buffer("usage", torch.zeros(codebook_size))  # vectors a step and entry, moving average
        self.register_buffer("restarts", torch.zeros((), dtype=torch.int64))  # batches that gave dead entries vectors

    def _make_codebook(self, initial: Tensor) -> None:
        self.codebook = nn.Parameter(initial)

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """latents: (B, c, h, w); in training mode also learns, and restarts dead entries."""
        batch, channels, height, width = latents.shape
        with torch.autocast(latents.device.type, enabled=False):
            vectors = widened(latents).movedim(1, -1).reshape(-1, channels)  # (N, c)
            learning = self.training and all_finite(vectors)  # or one bad batch would stay in the moving averages
            if learning:
                self._restart(vectors.detach())
            indices = nearest_code(vectors.detach(), self.codebook.detach())
            chosen = F.embedding(indices, self.codebook)
            codebook_loss = F.mse_loss(chosen, vectors.detach())
            commitment_loss = F.mse_loss(vectors, chosen.detach())
            if learning:
                self._count(indices, vectors.detach())
            quantized = vectors + (chosen - vectors).detach()
        return QuantizerOutput(
            quantized.view(batch, height, width, channels).movedim(-1, 1).to(latents.dtype),
            indices.view(batch, height, width),
            codebook_loss,
            commitment_loss,
        )

    def quantize(self, latents: Tensor) -> Tensor:
        """Indices (B, h, w) of latents (B, c, h, w)."""
        batch, channels, height, width = latents.shape
        return nearest_code(latents.movedim(1, -1).reshape(-1, channels), self.codebook).view(batch, height, width)

    def lookup(self, indices: Tensor) -> Tensor:
        """Codebook entries (B, c, h, w) of indices (B, h, w)."""
        return F.embedding(indices, self.codebook).movedim(-1, 1)

    @torch.no_grad()
    def _count(self, indices: Tensor, vectors: Tensor) -> None:
        counts = summed(torch.bincount(indices, minlength=len(self.usage)).to(self.usage.dtype))
        self.usage.lerp_(counts, 1 - self.usage_decay)

    @torch.no_grad()
    def _restart(self, vectors: Tensor) -> None:
        """Gives every dead entry a vector of all processes' batches; all see the same usage and take the same vectors."""
        if self.restart_threshold == 0 and float(self.usage.sum()) > 0:
            return
        uniform = float(summed(vectors.new_tensor(len(vectors)))) / len(self.usage)
        dead = self.usage <= self.restart_threshold * uniform
        if not dead.any():
            return
        candidates = gathered(vectors)
        self.restarts += 1
        generator = torch.Generator().manual_seed(
            int(self.restarts)
        )  # one draw for all processes, whatever their number
        chosen = torch.randint(len(candidates), (len(self.usage),), generator=generator).to(vectors.device)
        self._replace(dead, candidates[chosen], uniform)

    def _replace(self, dead: Tensor, candidates: Tensor, usage: float) -> None:
        self.codebook.data.copy_(torch.where(dead[:, None], candidates.to(self.codebook.dtype), self.codebook.data))
        self.usage.copy_(torch.where(dead, usage, self.usage))


def all_finite(values: Tensor) -> bool:
    """Whether no process holds a number that is not finite."""
    return not summed((~values.detach().isfinite()).any().to(values.dtype))


def summed(values: Tensor) -> Tensor:
    """Sum over processes."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def gathered(values: Tensor) -> Tensor:
    """(N, …) of every process, one after another: (processes · N, …)."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)
