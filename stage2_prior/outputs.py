"""What every prior returns from `forward`."""

from typing import NamedTuple

from torch import Tensor


class PriorLoss(NamedTuple):
    total: Tensor  # scalar float32: what is minimised
    terms: dict[str, Tensor]  # its parts by name, scalars
