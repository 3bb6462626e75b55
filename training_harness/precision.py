"""Where half precision would not do."""

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """`x` in float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
