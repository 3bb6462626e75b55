"""Transformer blocks: pre-norm, causal self-attention with rotary positions, SwiGLU.

The blocks follow Llama (Touvron et al. 2023, arXiv 2302.13971). Grouped queries: Ainslie et al. 2023, arXiv 2305.13245. Norms of
queries and keys: Henry et al. 2020, arXiv 2010.04245.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from stage2_prior.autoregressive.config import AutoregressiveModel
from stage2_prior.autoregressive.kv_cache import Cache
from stage2_prior.layers.attention import plain_attention, prefers_plain_attention
from stage2_prior.layers.feed_forward import SwiGLU
from stage2_prior.layers.normalization import RMSNorm
from stage2_prior.layers.rotary import RotaryFactors, rotate


class Attention(nn.Module):
    """Causal self-attention with rotary positions. With a cache it attends to the cached tokens too."""

    def __init__(self, model: AutoregressiveModel) -> None:
        super().__init__()
        width, key_width = model.hidden_size, model.key_value_heads * model.head_dim
        self.head_dim, self.dropout = model.head_dim, model.dropout
        self.groups = model.num_heads // model.key_value_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(width, key_width, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width, bias=False)
        self.query_norm, self.key_norm = (
            RMSNorm(model.head_dim, eps=model.rms_norm_eps) if model.qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor, rotary: RotaryFactors, cache: Cache | None) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, tokens, head_dim)
            for project in (self.query, self.key, self.value)
        )
        query, key = rotate(self.query_norm(query), *rotary), rotate(self.key_norm(key), *rotary)
        mask = None
        if cache is not None:
            key, value, mask = cache.append(key, value)
        new_tokens = query.shape[2]
        causal = mask is None and 1 < new_tokens == key.shape[2]  # a single new token attends to all tokens
        dropout = self.dropout if self.training else 0.0
        if causal and prefers_plain_attention(new_tokens, x.device):
            key, value = (
                heads.repeat_interleave(self.groups, 1) if self.groups > 1 else heads for heads in (key, value)
            )
            attended = plain_attention(query, key, value, causal=True, dropout=dropout)
        else:
            attended = F.scaled_dot_product_attention(
                query, key, value, mask, dropout, is_causal=causal, enable_gqa=self.groups > 1
            )
        return self.out(attended.transpose(1, 2).flatten(2))


class Block(GradientCheckpointingLayer):
    def __init__(self, model: AutoregressiveModel) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(model.hidden_size, eps=model.rms_norm_eps)
        self.attention = Attention(model)
        self.feed_forward_norm = RMSNorm(model.hidden_size, eps=model.rms_norm_eps)
        self.feed_forward = SwiGLU(model.hidden_size, model.intermediate_size)
        self.dropout = nn.Dropout(model.dropout)

    def forward(self, x: Tensor, rotary: RotaryFactors, cache: Cache | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
