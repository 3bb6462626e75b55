"""Stops a run whose loss is no longer finite, and says which term went wrong first."""

import math
from collections.abc import Mapping

from torch import Tensor

from training_harness.errors import UserError


class NonFiniteLossError(UserError):
    """Several steps in a row had a loss that is not a finite number."""


class NonFiniteGuard:
    """Lets single bad steps be skipped; raises NonFiniteLossError after `patience` of them in a row."""

    def __init__(self, patience: int = 5) -> None:
        self.patience = patience
        self.in_a_row = 0

    def allows(self, step: int, terms: Mapping[str, Tensor], gradient_norm: Tensor | float) -> bool:
        """Whether the step may be taken: every loss term and the gradient's norm are finite."""
        values = {name: float(term.detach()) for name, term in terms.items()} | {"gradient norm": float(gradient_norm)}
        wrong = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
        self.in_a_row = self.in_a_row + 1 if wrong else 0
        if self.in_a_row >= self.patience:
            raise NonFiniteLossError(
                f"step {step}: {', '.join(wrong)}, {self.in_a_row} steps in a row; expected finite numbers; lower "
                "--optimizer.learning-rate or use --mixed-precision no, then run again to go on from the last checkpoint"
            )
        return not wrong
