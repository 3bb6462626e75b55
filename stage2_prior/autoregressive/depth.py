r"""Depth transformer: predicts the codes of one position of a residual grid, level by level.

    p(k_1 … k_L | h) = Π_l p(k_l | h, k_1 … k_{l−1}),     inputs: h, then the sum of the embeddings of the codes so far

h is the hidden state of the prior at the position. Lee et al. 2022, arXiv 2203.01941 (RQ-Transformer).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stage2_prior.autoregressive.blocks import Block
from stage2_prior.autoregressive.config import AutoregressivePriorConfig
from stage2_prior.autoregressive.kv_cache import KVCache
from stage2_prior.layers.normalization import RMSNorm
from stage2_prior.layers.rotary import rotary_angles, rotary_factors


class DepthTransformer(nn.Module):
    def __init__(self, config: AutoregressivePriorConfig) -> None:
        super().__init__()
        model = config.model
        self.levels, self.head_dim, self.theta = config.levels, model.head_dim, model.rope_theta
        self.level_embedding = nn.Embedding(config.levels, model.hidden_size)
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.depth_layers))
        self.norm = RMSNorm(model.hidden_size, eps=model.rms_norm_eps)

    def forward(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Compute a hidden state for each level of N positions.

        Args:
            hidden: (N, hidden) hidden states of the positions.
            codes: (N, levels − 1, hidden) embeddings of all codes but the last.

        Returns:
            (N, levels, hidden).
        """
        return self.hidden_states(torch.cat([hidden[:, None], codes.cumsum(1)], dim=1))

    def hidden_states(self, inputs: Tensor, caches: Sequence[KVCache] | None = None) -> Tensor:
        """Transform inputs (N, n, hidden) of n levels; with caches they follow the cached levels."""
        first = caches[0].tokens if caches else 0
        levels = slice(first, first + inputs.shape[1])
        rotary = rotary_factors(rotary_angles(1, self.levels, self.head_dim, 1, self.theta).to(inputs.device)[levels])
        inputs = inputs + self.level_embedding.weight[levels]
        for i, block in enumerate(self.blocks):
            inputs = block(inputs, rotary, caches[i] if caches else None)
        return self.norm(inputs)
