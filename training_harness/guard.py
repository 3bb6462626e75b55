"""Watches loss terms and gradients: skips bad steps, stops a run that stays bad, and says where it went wrong.

A spike is a gradient norm of more than `SPIKE` times the median of the last `WINDOW` ones.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from training_harness.errors import UserError
from training_harness.sharding import gather_tensors

PATIENCE, SPIKE_WINDOW, SPIKE_RATIO = 5, 100, 10.0


class NonFiniteLossError(UserError):
    """Several steps in a row had a loss or a gradient that is not a finite number."""


class NonFiniteGuard:
    """Lets single bad steps be skipped; `exhausted` after `patience` of them in a row."""

    def __init__(self, patience: int = PATIENCE) -> None:
        self.patience = patience
        self.consecutive_skips = 0
        self.non_finite_values: dict[str, float] = {}
        """What was not finite at the last step."""
        self._norms: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def allows(self, terms: Mapping[str, Tensor], gradient_norm: float, anywhere: Callable[[int], int] = int) -> bool:
        """Whether the step may be taken: every loss term and the gradient's norm are finite.

        `anywhere` says of how many terms are wrong on this process how many are on the worst, so that all skip together.
        """
        found = torch.stack([term.detach().float() for term in terms.values()]).tolist()  # one wait for the device
        values = dict(zip(terms, found, strict=True)) | {"gradient norm": gradient_norm}
        self.non_finite_values = {name: value for name, value in values.items() if not math.isfinite(value)}
        skipped = anywhere(len(self.non_finite_values)) > 0
        self.consecutive_skips = self.consecutive_skips + 1 if skipped else 0
        return not skipped

    @property
    def is_exhausted(self) -> bool:
        return self.consecutive_skips >= self.patience

    def build_error(self, step: int, where: str) -> NonFiniteLossError:
        wrong = (
            ", ".join(f"{name} = {value}" for name, value in self.non_finite_values.items())
            or "a number of another process"
        )
        return NonFiniteLossError(
            f"step {step}: {wrong}, {self.consecutive_skips} steps in a row, first in {where}; expected finite numbers; lower "
            "--optimizer.learning-rate or use --mixed-precision no, then run again to go on from the last checkpoint"
        )

    def detect_spike(self, gradient_norm: float) -> float | None:
        """The usual norm when this one is far above it; one that is no number, as when fp16 overflows, does not count."""
        if not math.isfinite(gradient_norm):
            return None
        usual = statistics.median(self._norms) if len(self._norms) >= SPIKE_WINDOW // 5 else math.inf
        self._norms.append(gradient_norm)
        return usual if gradient_norm > SPIKE_RATIO * usual else None


@torch.no_grad()
def find_first_non_finite(model: nn.Module, inputs: tuple[Any, ...]) -> str:
    """The first tensor that is not finite: a parameter, a layer's output for `inputs`, or else a gradient."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not _is_finite(tensor):
            return f"the parameter {name}"
    found: list[str] = []
    hooks = [
        module.register_forward_hook(
            lambda _, __, output, name=name: (
                None if _is_finite(output) else found.append(f"the output of {name or 'the model'}")
            )
        )
        for name, module in model.named_modules()
    ]
    try:
        if inputs:
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return found[0]
    gradients = [name for name, p in model.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
    return (
        f"the gradient of {gradients[-1]}" if gradients else "a term outside the model"
    )  # the last is nearest to the loss


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        value = gather_tensors(value)
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return all(map(_is_finite, value)) if isinstance(value, tuple | list) else True
