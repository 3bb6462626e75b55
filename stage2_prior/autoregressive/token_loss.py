r"""Cross-entropy of a linear head in chunks of tokens, without the logits of a whole batch in memory.

    L = −mean_n log softmax(W h_n)_{k_n},    ∂L/∂(W h_n) = (softmax(W h_n) − e_{k_n}) / N

The gradients of a chunk are computed in the forward pass, right after its logits. Nothing is computed twice, and the saved tensors
are as large as the hidden states and the head. For comparison, the float32 logits of 128 sequences of 256 codes with K = 16,384
take 2 GiB.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training_harness.precision import upcast

LOGITS_PER_CHUNK = {"cpu": 2**20}  # on a CPU, the logits of a chunk stay in its cache
DEFAULT_LOGITS_PER_CHUNK = 2**26


def head_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean cross-entropy, in nats, of targets under the logits `hidden @ weight.T`.

    Args:
        hidden: (N, H) hidden states.
        weight: (K, H) weight of the head.
        targets: (N,) int64 in [0, K).

    Returns:
        Scalar in float32 or wider.
    """
    tokens = max(LOGITS_PER_CHUNK.get(hidden.device.type, DEFAULT_LOGITS_PER_CHUNK) // len(weight), 1)
    return _HeadCrossEntropy.apply(hidden, weight, targets, tokens)


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        needs_grad, count = any(ctx.needs_input_grad), len(targets)
        total = upcast(hidden.new_zeros(()))
        hidden_grads, weight_grad = [], torch.zeros_like(upcast(weight)) if needs_grad else None
        for part, codes in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = F.linear(part, weight)
            log_probabilities = upcast(logits).log_softmax(1)  # (chunk, K)
            total -= log_probabilities.gather(1, codes[:, None]).sum()
            if weight_grad is not None:
                gradient = log_probabilities.exp_().scatter_add_(1, codes[:, None], -total.new_ones(len(codes), 1))
                # Division by N comes last, since half precision would underflow.
                gradient = gradient.to(logits.dtype)
                hidden_grads.append(gradient @ weight)
                weight_grad += gradient.mT @ part
        if weight_grad is not None:
            ctx.save_for_backward(torch.cat(hidden_grads), weight_grad)
            ctx.dtypes, ctx.count = (hidden.dtype, weight.dtype), count
        return total / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        factor = gradients[0] / ctx.count
        hidden_grad, weight_grad = (
            (factor * saved).to(dtype) for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return hidden_grad, weight_grad, None, None
