"""SwiGLU: down(SiLU(gate x) · up x). Shazeer 2020, arXiv 2002.05202."""

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(hidden_size, intermediate_size, bias=False) for _ in range(2))
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
