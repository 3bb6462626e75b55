"""Casts for computations that need more than half precision."""

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """Cast to float32; float64 is not changed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
