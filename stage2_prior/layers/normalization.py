r"""RMSNorm with a gradient written by hand where torch has no fused kernel.

    n = x / √(mean x² + ε),    y = g n,    ∂L/∂x = (g ∂L/∂y − n · mean(n g ∂L/∂y)) / √(mean x² + ε)
    and forwards, ẏ = g (ẋ − n · mean(n ẋ)) / √(mean x² + ε) + ġ n

Zhang and Sennrich 2019, arXiv 1910.07467. On a CPU torch composes it of seven operations, whose gradients take most of
the time that a small transformer spends outside its matrix products.
"""

from typing import Any

import torch
from torch import Tensor, nn

from training_harness.precision import upcast


class RMSNorm(nn.RMSNorm):
    """Over the last axis; computed in float32 or wider."""

    def forward(self, x: Tensor) -> Tensor:
        # a compiler fuses the operations itself, and that of torch 2.11 loses the gradient of such a function
        by_hand = x.device.type == "cpu" and not torch.compiler.is_compiling()
        return _RMSNorm.apply(x, self.weight, self.eps) if by_hand else super().forward(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = upcast(x)
        scale = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        normalized = wide * scale
        ctx.save_for_backward(normalized, scale, weight)
        ctx.save_for_forward(normalized, scale, weight)
        return (normalized * weight).to(x.dtype)

    @staticmethod
    def jvp(ctx: Any, of_x: Tensor, of_weight: Tensor | None, _: None) -> Tensor:
        normalized, scale, weight = ctx.saved_tensors
        wide = of_x.to(normalized.dtype)
        mean = torch.linalg.vecdot(normalized, wide).div_(wide.shape[-1]).unsqueeze(-1)
        moved = (wide - normalized * mean) * scale * weight
        return (moved if of_weight is None else moved + normalized * of_weight).to(of_x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        normalized, scale, weight = ctx.saved_tensors
        gradient = gradients[0].to(normalized.dtype)
        together = gradient * normalized
        of_weight = together.flatten(0, -2).sum(0)
        shared = (together @ weight.to(together.dtype)).div_(-normalized.shape[-1]).unsqueeze(-1)
        of_x = (gradient * weight).addcmul_(normalized, shared).mul_(scale)
        return of_x.to(gradients[0].dtype), of_weight.to(weight.dtype), None
