"""Attention as plain products, for training on a CPU at few tokens.

torch's blocked kernel for CPUs is eight times as slow at 49 tokens where products round their factors. Where they do not, it is as
quick at 64 tokens and quicker from there on.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from training_harness.matmul_precision import uses_bf16_matmul

SHORT, SHORT_IF_ROUNDED = 64, 256  # tokens up to which plain products are the quicker ones


def plain_products_pay(tokens: int, device: torch.device) -> bool:
    short = SHORT_IF_ROUNDED if uses_bf16_matmul(device) else SHORT
    return tokens <= short and device.type == "cpu" and torch.is_grad_enabled()


def carries_derivative(x: Tensor) -> bool:
    """Whether x is differentiated forwards, which torch's fused kernels of attention are not."""
    return forward_ad.unpack_dual(x).tangent is not None


def plain_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool = False, dropout: float = 0.0) -> Tensor:
    """softmax(QKᵀ / √d + mask) V of (B, heads, tokens, d)."""
    tokens, width = query.shape[-2:]
    query, key, values = (x.reshape(-1, tokens, width) for x in (query, key, value))
    if causal:
        mask = query.new_full((tokens, tokens), -math.inf).triu(1)
        scores = torch.baddbmm(mask.expand(len(query), -1, -1), query, key.mT, alpha=width**-0.5)
    else:
        scores = (query * width**-0.5) @ key.mT
    return (F.dropout(scores.softmax(-1), dropout) @ values).view(value.shape)
