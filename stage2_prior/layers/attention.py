"""Attention with plain matmuls, for training on a CPU with few tokens.

At 49 tokens, with bfloat16 matmuls, torch's fused kernel for CPUs takes eight times as long. With float32 matmuls it is as fast at
64 tokens and faster above.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from training_harness.matmul_precision import uses_bf16_matmul

MAX_PLAIN_TOKENS, MAX_PLAIN_TOKENS_BF16 = 64, 256  # plain matmuls are faster up to this number of tokens


def prefers_plain_attention(tokens: int, device: torch.device) -> bool:
    """Return whether `plain_attention` is faster than torch's fused kernel."""
    max_tokens = MAX_PLAIN_TOKENS_BF16 if uses_bf16_matmul(device) else MAX_PLAIN_TOKENS
    return tokens <= max_tokens and device.type == "cpu" and torch.is_grad_enabled()


def has_forward_tangent(x: Tensor) -> bool:
    """Return whether x has a forward-mode tangent, which torch's fused attention kernels do not support."""
    return forward_ad.unpack_dual(x).tangent is not None


def plain_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool = False, dropout: float = 0.0) -> Tensor:
    """Compute softmax(QKᵀ / √d + mask) V for (B, heads, tokens, d)."""
    tokens, width = query.shape[-2:]
    query, key, values = (x.reshape(-1, tokens, width) for x in (query, key, value))
    if causal:
        mask = query.new_full((tokens, tokens), -math.inf).triu(1)
        scores = torch.baddbmm(mask.expand(len(query), -1, -1), query, key.mT, alpha=width**-0.5)
    else:
        scores = (query * width**-0.5) @ key.mT
    return (F.dropout(scores.softmax(-1), dropout) @ values).view(value.shape)
