r"""GELU by a tanh, computed as a sigmoid, for which a CPU takes a third of a tanh's time, with its slope found in the forward pass.

    gelu(x) = x σ(v),   v = 2 √(2/π) (x + a x³),   a = 0.044715         since (1 + tanh(v / 2)) / 2 = σ(v)
    gelu'(x) = σ(v) + x σ(v) (1 − σ(v)) · 2 √(2/π) (1 + 3 a x²)

The slope is kept for the backward pass in the place of x. Hendrycks, Gimpel 2016, arXiv 1606.08415.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior.layers.attention import has_forward_tangent

SCALE, CUBE = 2 * math.sqrt(2 / math.pi), 0.044715
CHUNK_SIZE = 2**18  # numbers, of which all that is computed stays in a core's cache


class GELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.dtype in (torch.float32, torch.float64)
        by_hand = wide and x.device.type == "cpu" and not torch.compiler.is_compiling() and not has_forward_tangent(x)
        return _GELU.apply(x) if by_hand else F.gelu(x, approximate="tanh")


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        found, slopes = torch.empty_like(x), torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for begin in range(0, x.numel(), CHUNK_SIZE):
            part = slice(begin, begin + CHUNK_SIZE)
            given, out = x.view(-1)[part], found.view(-1)[part]
            square = given.square()
            sigmoid = torch.addcmul(given, given, square, value=CUBE).mul_(SCALE).sigmoid_()
            torch.mul(given, sigmoid, out=out)
            if slopes is not None:
                rising = torch.addcmul(out, out, sigmoid, value=-1)  # x σ (1 − σ)
                torch.addcmul(sigmoid, rising, square.mul_(3 * CUBE * SCALE).add_(SCALE), out=slopes.view(-1)[part])
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (slopes,) = ctx.saved_tensors
        return gradients[0] * slopes
