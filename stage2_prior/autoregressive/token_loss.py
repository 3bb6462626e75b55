r"""Cross-entropy of a linear head, in chunks of tokens: the logits of a batch never exist at once.

    L = −mean_n log softmax(W h_n)_{k_n},    ∂L/∂(W h_n) = (softmax(W h_n) − e_{k_n}) / N

A chunk's gradients are taken while its logits are at hand, so nothing is computed twice, and what is kept for the backward
pass is as large as the hidden states and the head. 128 sequences of 256 codes of 16,384 would have 2 GiB of float32 logits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training_harness.precision import upcast

CHUNK = {"cpu": 2**20}  # logits at once: on a CPU, those that stay in its cache
CHUNK_ELSEWHERE = 2**26


def head_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean nats, a scalar float32 (or wider), of targets (N,) int64 under the logits `hidden @ weight.T`.

    Args:
        hidden: (N, H).
        weight: (K, H).
    """
    tokens = max(CHUNK.get(hidden.device.type, CHUNK_ELSEWHERE) // len(weight), 1)
    return _HeadCrossEntropy.apply(hidden, weight, targets, tokens)


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        trained, count = any(ctx.needs_input_grad), len(targets)
        total = upcast(hidden.new_zeros(()))
        of_hidden, of_weight = [], torch.zeros_like(upcast(weight)) if trained else None
        for part, codes in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = F.linear(part, weight)
            log_probabilities = upcast(logits).log_softmax(1)  # (chunk, K)
            total -= log_probabilities.gather(1, codes[:, None]).sum()
            if of_weight is not None:
                gradient = log_probabilities.exp_().scatter_add_(1, codes[:, None], -total.new_ones(len(codes), 1))
                gradient = gradient.to(logits.dtype)  # not yet divided by N, which half precision would lose
                of_hidden.append(gradient @ weight)
                of_weight += gradient.mT @ part
        if of_weight is not None:
            ctx.save_for_backward(torch.cat(of_hidden), of_weight)
            ctx.types, ctx.count = (hidden.dtype, weight.dtype), count
        return total / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        factor = gradients[0] / ctx.count
        of_hidden, of_weight = (
            (factor * saved).to(kind) for saved, kind in zip(ctx.saved_tensors, ctx.types, strict=True)
        )
        return of_hidden, of_weight, None, None
