r"""RMSNorm with an explicit gradient on CPUs, where torch has no fused kernel.

    n = x / √(mean x² + ε),    y = g n,    ∂L/∂x = (g ∂L/∂y − n · mean(n g ∂L/∂y)) / √(mean x² + ε)
    forward mode: ẏ = g (ẋ − n · mean(n ẋ)) / √(mean x² + ε) + ġ n

Zhang and Sennrich 2019, arXiv 1910.07467. On a CPU torch uses seven operations. Their gradients take most of the time that a small
transformer spends outside its matmuls.
"""

from typing import Any

import torch
from torch import Tensor, nn

from training_harness.precision import upcast


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last axis, computed in float32 or wider."""

    def forward(self, x: Tensor) -> Tensor:
        # torch.compile fuses the operations itself, and in torch 2.11 it loses the gradient of a custom function.
        use_custom_gradient = x.device.type == "cpu" and not torch.compiler.is_compiling()
        return _RMSNorm.apply(x, self.weight, self.eps) if use_custom_gradient else super().forward(x)


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
    def jvp(ctx: Any, x_tangent: Tensor, weight_tangent: Tensor | None, _: None) -> Tensor:
        normalized, scale, weight = ctx.saved_tensors
        wide = x_tangent.to(normalized.dtype)
        mean = torch.linalg.vecdot(normalized, wide).div_(wide.shape[-1]).unsqueeze(-1)
        tangent = (wide - normalized * mean) * scale * weight
        if weight_tangent is not None:
            tangent = tangent + normalized * weight_tangent
        return tangent.to(x_tangent.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        normalized, scale, weight = ctx.saved_tensors
        gradient = gradients[0].to(normalized.dtype)
        product = gradient * normalized
        weight_grad = product.flatten(0, -2).sum(0)
        negative_mean = (product @ weight.to(product.dtype)).div_(-normalized.shape[-1]).unsqueeze(-1)
        x_grad = (gradient * weight).addcmul_(normalized, negative_mean).mul_(scale)
        return x_grad.to(gradients[0].dtype), weight_grad.to(weight.dtype), None
