r"""Muon: momentum, then the nearest orthogonal matrix, for hidden matrices; AdamW for everything else.

    M_t = μ M_{t−1} + G_t,     W ← (1 − ηλ) W − η · √max(1, rows / columns) · NS(G_t + μ M_t)

NS(X) pushes the singular values of X / ‖X‖ towards 1 by five steps of X ← aX + (bA + cA²)X, A = XXᵀ, with
(a, b, c) = (3.4445, −4.7750, 2.0315). Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.

torch.optim.Muon iterates in bfloat16, one matrix at a time, and does not accept convolution kernels. Here all matrices of one
shape are iterated together. The iterations are in bfloat16 on GPUs and with reduced matmul precision, and in float32 elsewhere: on
a CPU without bfloat16 instructions bfloat16 products can be hundreds of times slower. A kernel is reshaped to
(out, in · height · width). One optimizer holds both kinds of parameters, so a loop has a single `step()`. With a sharded model
every process iterates the complete matrices, because singular values cannot be computed from one shard; for large priors AdamW
is faster.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from training_harness.matmul_precision import uses_bf16_matmul
from training_harness.sharding import gather_tensors, shard_like

NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def iteration_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 on GPUs and within `reduced_matmul_precision` (two to five times as fast), else float32."""
    return torch.bfloat16 if device.type == "cuda" or uses_bf16_matmul(device) else torch.float32


def orthogonalize(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Orthogonalize matrices by five Newton–Schulz iterations.

    Args:
        matrices: (N, rows, columns).
        dtype: Type of the iterations; `iteration_dtype` by default.

    Returns:
        (N, rows, columns) in the type of `matrices`, with singular values in about [0.7, 1.2].
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(dtype or iteration_dtype(matrices.device))
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for parameter groups with `orthogonalize=True`, AdamW for the other groups.

    Args:
        params: Parameter groups. A Muon group has lr, weight_decay and momentum; an AdamW group has lr, betas, eps and
            weight_decay.
        lr: Default learning rate.
    """

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        defaults = {"lr": lr, "weight_decay": 0.0, "momentum": 0.95, "betas": (0.9, 0.95), "eps": 1e-8}
        super().__init__(params, defaults | {"orthogonalize": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["orthogonalize"]:
                self._step_muon(group, parameters)
            else:
                self._step_adamw(group, parameters)

    def _step_muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p in parameters:
            state, gradient = self.state[p], _gradient(p)
            if not state:
                state["momentum"] = torch.zeros_like(p)
            momentum = state["momentum"]
            momentum.mul_(group["momentum"]).add_(gradient)
            update = gather_tensors(gradient.add(momentum, alpha=group["momentum"])).to(p.device).flatten(1)
            by_shape[update.shape[0], update.shape[1]].append((p, update))
        for (rows, columns), pairs in by_shape.items():
            updates = orthogonalize(torch.stack([update for _, update in pairs]))
            rate = group["lr"] * max(1, rows / columns) ** 0.5
            for (p, _), update in zip(pairs, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(shard_like(update.view(p.shape), p), alpha=-rate)

    def _step_adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        for p in parameters:
            state, gradient = self.state[p], _gradient(p)
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
            mean, square = state["exp_avg"], state["exp_avg_sq"]
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            root = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
            p.mul_(1 - lr * group["weight_decay"]).addcdiv_(mean, root, value=-lr / (1 - beta1 ** state["step"]))


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "parameters without a gradient are skipped by step()"
    return parameter.grad
