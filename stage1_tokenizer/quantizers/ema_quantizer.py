r"""Vector quantization with a codebook of exponential moving averages instead of a codebook loss.

    n_k ← γ n_k + (1 − γ) |{z : k(z) = k}|,    m_k ← γ m_k + (1 − γ) Σ_{k(z)=k} z,    e_k = m_k / n_k

van den Oord et al. 2017, arXiv 1711.00937, appendix A.1. Counts and sums are added up over processes at every step, so all
processes have the same codebook. A restarted entry gets a new sum and a new count with its new vector.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stage1_tokenizer.quantizers.protocol import all_reduce_sum
from stage1_tokenizer.quantizers.vector_quantizer import CodebookConfig, VectorQuantizer


@dataclass(frozen=True, kw_only=True)
class EMAVectorQuantizerConfig(CodebookConfig):
    name: Literal["ema"] = "ema"


class EMAVectorQuantizer(VectorQuantizer):
    sums: Tensor

    def _create_codebook(self, initial: Tensor) -> None:
        self.register_buffer("codebook", initial)
        self.register_buffer("sums", torch.zeros_like(initial))  # m; n is `usage`

    @torch.no_grad()
    def _update_usage(self, indices: Tensor, vectors: Tensor) -> None:
        super()._update_usage(indices, vectors)
        sums = all_reduce_sum(torch.zeros_like(self.sums).index_add_(0, indices, vectors.to(self.sums.dtype)))
        self.sums.lerp_(sums, 1 - self.config.usage_decay)
        self.codebook.copy_(self.sums / self.usage.clamp(min=1e-6)[:, None])

    def _replace_entries(self, dead: Tensor, entries: Tensor, usage: float) -> None:
        super()._replace_entries(dead, entries, usage)
        self.sums.copy_(torch.where(dead[:, None], entries.to(self.sums.dtype) * usage, self.sums))
