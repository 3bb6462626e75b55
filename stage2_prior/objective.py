"""What a kind of prior brings to the loop of stage two: the network, what it is given at a step, and how it is judged."""

from typing import Any, Protocol

import numpy as np
from torch import Tensor

from stage2_prior.prior import Prior


class Objective(Protocol):
    num_random: int
    """Numbers that an image of a batch needs at random."""

    def new_prior(self) -> Prior: ...

    def list_warnings(self) -> list[str]:
        """What the user should know of the codes before training."""

    def prepare_inputs(self, rows: np.ndarray, uniform: Tensor, step: int) -> tuple[Tensor | None, ...]:
        """What the prior's `forward` is given for the images at `rows` of the training split.

        Args:
            uniform: (B, self.num_random) float64 in [0, 1).
        """

    def validate(self, prior: Any) -> dict[str, float]:
        """Figures on the validation split by their names in the log, each process having seen its share of it; the first, the
        lower the better, is what runs are judged by."""
