"""Training objective: the part of stage two's training loop that depends on the kind of prior."""

from typing import Any, Protocol

import numpy as np
from torch import Tensor

from stage2_prior.prior import Prior


class Objective(Protocol):
    """Creates the prior, prepares the inputs of a training step, and computes validation metrics."""

    num_random: int
    """Uniform random numbers that a training step takes for each image."""

    def new_prior(self) -> Prior: ...

    def list_warnings(self) -> list[str]:
        """Return warnings about the codes, to print before training."""

    def prepare_inputs(self, rows: np.ndarray, uniform: Tensor, step: int) -> tuple[Tensor | None, ...]:
        """Prepare the arguments of the prior's `forward` for a batch.

        Args:
            rows: (B,) rows of the training split.
            uniform: (B, self.num_random) float64 in [0, 1).
            step: Optimizer step in [1, max_steps].
        """

    def validate(self, prior: Any) -> dict[str, float]:
        """Compute metrics on the validation split, by their names in the log; each process takes its share of the images.

        The first metric is the validation loss, which selects the best checkpoint. Lower is better.
        """
