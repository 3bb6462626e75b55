r"""GELU with the tanh approximation, computed with a sigmoid, which takes a third of the time of a tanh on a CPU.

    gelu(x) = x σ(v),   v = 2 √(2/π) (x + a x³),   a = 0.044715         since (1 + tanh(v / 2)) / 2 = σ(v)
    gelu'(x) = σ(v) + x σ(v) (1 − σ(v)) · 2 √(2/π) (1 + 3 a x²)

The forward pass computes the slope and saves it for the backward pass, instead of x. Hendrycks, Gimpel 2016, arXiv 1606.08415.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior.layers.attention import has_forward_tangent

SCALE, CUBE = 2 * math.sqrt(2 / math.pi), 0.044715
CHUNK_SIZE = 2**18  # elements; all intermediate results of a chunk fit the cache of a core


class GELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        is_wide = x.dtype in (torch.float32, torch.float64)
        is_eager_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        use_sigmoid = is_wide and is_eager_cpu and not has_forward_tangent(x)
        return _GELU.apply(x) if use_sigmoid else F.gelu(x, approximate="tanh")


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        output, slopes = torch.empty_like(x), torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for begin in range(0, x.numel(), CHUNK_SIZE):
            chunk = slice(begin, begin + CHUNK_SIZE)
            x_chunk, out = x.view(-1)[chunk], output.view(-1)[chunk]
            square = x_chunk.square()
            sigmoid = torch.addcmul(x_chunk, x_chunk, square, value=CUBE).mul_(SCALE).sigmoid_()
            torch.mul(x_chunk, sigmoid, out=out)
            if slopes is not None:
                product = torch.addcmul(out, out, sigmoid, value=-1)  # x σ (1 − σ)
                torch.addcmul(sigmoid, product, square.mul_(3 * CUBE * SCALE).add_(SCALE), out=slopes.view(-1)[chunk])
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (slopes,) = ctx.saved_tensors
        return gradients[0] * slopes
