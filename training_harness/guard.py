"""Check loss terms and gradients: skip non-finite steps, stop the run if they continue, and name their origin.

A spike is a gradient norm greater than `SPIKE_RATIO` times the median of the last `SPIKE_WINDOW` norms.
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
    """The loss or a gradient was not finite in several steps in a row."""


class NonFiniteGuard:
    """Decide which steps to skip because the loss or a gradient is not finite.

    Args:
        patience: Number of skipped steps in a row after which `is_exhausted` is true.
    """

    def __init__(self, patience: int = PATIENCE) -> None:
        self.patience = patience
        self.consecutive_skips = 0
        self.non_finite_values: dict[str, float] = {}
        """Non-finite values of the last step by name."""
        self._norms: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def allows(
        self, terms: Mapping[str, Tensor], gradient_norm: float, max_over_processes: Callable[[int], int] = int
    ) -> bool:
        """Return whether the optimizer step may be taken: all loss terms and the gradient norm are finite.

        Args:
            terms: Scalar loss terms by name.
            gradient_norm: Global norm of the gradients.
            max_over_processes: Returns the maximum of a number over all processes, so that all processes skip together.
        """
        term_values = torch.stack([term.detach().float() for term in terms.values()]).tolist()  # one device sync
        values = dict(zip(terms, term_values, strict=True)) | {"gradient norm": gradient_norm}
        self.non_finite_values = {name: value for name, value in values.items() if not math.isfinite(value)}
        skipped = max_over_processes(len(self.non_finite_values)) > 0
        self.consecutive_skips = self.consecutive_skips + 1 if skipped else 0
        return not skipped

    @property
    def is_exhausted(self) -> bool:
        """Whether `patience` steps in a row were skipped."""
        return self.consecutive_skips >= self.patience

    def build_error(self, step: int, origin: str) -> NonFiniteLossError:
        """Return the error of an exhausted guard; `origin` names the first non-finite tensor."""
        values = ", ".join(f"{name} = {value}" for name, value in self.non_finite_values.items())
        values = values or "a value on another process"
        return NonFiniteLossError(
            f"step {step}: {values}, {self.consecutive_skips} steps in a row, first in {origin}; expected finite numbers; "
            "lower --optimizer.learning-rate or pass --mixed-precision no, then run again to resume from the last checkpoint"
        )

    def detect_spike(self, gradient_norm: float) -> float | None:
        """Record a gradient norm; return the median norm if this one is a spike, else None.

        Non-finite norms, which fp16 overflow causes, are ignored.
        """
        if not math.isfinite(gradient_norm):
            return None
        median_norm = statistics.median(self._norms) if len(self._norms) >= SPIKE_WINDOW // 5 else math.inf
        self._norms.append(gradient_norm)
        return median_norm if gradient_norm > SPIKE_RATIO * median_norm else None


@torch.no_grad()
def find_first_non_finite(model: nn.Module, inputs: tuple[Any, ...]) -> str:
    """Return the name of the first non-finite tensor: a parameter, a layer's output for `inputs`, or a gradient."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not _is_finite(tensor):
            return f"the parameter {name}"
    outputs: list[str] = []
    hooks = [
        module.register_forward_hook(
            lambda _, __, output, name=name: (
                None if _is_finite(output) else outputs.append(f"the output of {name or 'the model'}")
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
    if outputs:
        return outputs[0]
    gradients = [name for name, p in model.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
    # The last layer is nearest to the loss, so its gradient is computed first.
    return f"the gradient of {gradients[-1]}" if gradients else "a term outside the model"


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        value = gather_tensors(value)
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return all(map(_is_finite, value)) if isinstance(value, tuple | list) else True
