"""What a kind of prior brings to the loop of stage two: the network, what it is given at a step, and how it is judged."""

from typing import Any, Protocol

import numpy as np
from torch import Tensor

from stage2_prior.prior import Prior


class Objective(Protocol):
    draws: int
    """Numbers that an image of a batch needs at random."""

    def new_prior(self) -> Prior: ...

    def warnings(self) -> list[str]:
        """What the user should know of the codes before training."""

    def inputs(self, rows: np.ndarray, draws: Tensor, step: int) -> tuple[Tensor | None, ...]:
        """What the prior's `forward` is given for the images at `rows` of the training split.

        Args:
            draws: (B, self.draws) float64 in [0, 1).
        """

    def validation(self, prior: Any) -> dict[str, float]:
        """Figures on the validation split by their names in the log, each process having seen its share of it; the first, the
        lower the better, is what runs are judged by."""
