r"""Products with a fixed matrix on a CPU, laid out for the number of rows that come at once.

    y = x Wᵀ,     x (rows, in),   W (out, in)
    one row:   y = Σ_i x_i W_{:, i}     a weighted bag of the rows of an embedding table, read from beginning to end

A row alone reads the whole matrix for two operations a number, so memory decides, and torch's bags read it faster than its products
do. Several rows are a small product, for which oneDNN lays the matrix out in blocks once; elsewhere that is done at each call.
Eight-bit weights, W ≈ diag(s) Q with s = max |row| / 127, are read in a quarter of the time and multiply activations in bfloat16.
Two operators are private to torch; where one is missing, or fails, the plain product stands in.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor], Tensor]
BAG = 256  # numbers of a bag at most: its sum stays in registers, and threads share the bags


def packed_product(weight: Tensor, rows: int, eight_bits: bool = False) -> Product:
    """A function of x (rows, in) that gives x Wᵀ (rows, out) for the weight (out, in) as it is now."""
    weight = weight.detach()
    if eight_bits:
        return _eight_bit_product(weight)
    return _bagged_product(weight) if rows == 1 else _blocked_product(weight, rows)


def _bagged_product(weight: Tensor) -> Product:
    size, inputs = weight.shape
    bags = next(count for count in range(2, size + 1) if size % count == 0 and size // count <= BAG) if size > 1 else 1
    table = weight.new_empty(bags * inputs, size // bags)
    for part, rows in zip(weight.chunk(bags), table.chunk(bags), strict=True):
        rows.copy_(part.T)
    everything = torch.arange(bags * inputs, dtype=torch.int32)
    begins, repeated = everything[::inputs].contiguous(), weight.new_empty(bags, inputs)
    factors = repeated.view(-1)

    def product(x: Tensor) -> Tensor:
        repeated.copy_(x)
        return torch.embedding_bag(table, everything, begins, False, 0, False, factors)[0].view(1, -1)

    return product


def _blocked_product(weight: Tensor, rows: int) -> Product:
    try:
        blocked = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

        def product(x: Tensor) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(x, blocked, None, "none", [], "")

        product(weight.new_zeros(rows, weight.shape[1]))
    except (AttributeError, RuntimeError):
        return lambda x: F.linear(x, weight)
    return product


def _eight_bit_product(weight: Tensor) -> Product:
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)
    quantized, scale = (weight / scale[:, None]).round().to(torch.int8), scale.bfloat16()
    try:
        torch._weight_int8pack_mm(torch.zeros(1, weight.shape[1], dtype=torch.bfloat16), quantized, scale)
    except (AttributeError, RuntimeError):
        restored = quantized.to(weight.dtype) * scale.to(weight.dtype)[:, None]
        return lambda x: F.linear(x, restored)
    return lambda x: torch._weight_int8pack_mm(x.bfloat16(), quantized, scale).to(x.dtype)
