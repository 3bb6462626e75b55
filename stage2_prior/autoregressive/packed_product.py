r"""Products with a fixed matrix on a CPU, laid out for the number of rows that come at once.

    y = x Wᵀ,     x (rows, in),   W (out, in)

A row alone reads the whole matrix for two operations a number, so memory decides: the transpose is read along its rows. Several
rows are a small product, for which oneDNN lays the matrix out in blocks once (`prepacked`); elsewhere it does so at each call.
Eight-bit weights, W ≈ diag(s) Q with s = max |row| / 127, are read in a quarter of the time and multiply activations in bfloat16.
Both operators are private to torch; where one is missing, or fails, the plain product stands in.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def packed_product(weight: Tensor, rows: int, eight_bits: bool = False) -> Product:
    """A function of x (rows, in) that gives x Wᵀ (rows, out) for the weight (out, in) as it is now."""
    if eight_bits:
        return _eight_bit_product(weight)
    if rows == 1:
        transposed = weight.detach().T.contiguous()
        return lambda x: torch.mm(x, transposed)
    return _prepacked_product(weight.detach(), rows)


def _prepacked_product(weight: Tensor, rows: int) -> Product:
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to_mkldnn(), rows)

        def product(x: Tensor) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

        product(weight.new_zeros(rows, weight.shape[1]))
    except (AttributeError, RuntimeError):
        return lambda x: F.linear(x, weight)
    return product


def _eight_bit_product(weight: Tensor) -> Product:
    scale = (weight.detach().abs().amax(1) / 127).clamp(min=1e-12)
    quantized, scale = (weight.detach() / scale[:, None]).round().to(torch.int8), scale.bfloat16()
    try:
        torch._weight_int8pack_mm(torch.zeros(1, weight.shape[1], dtype=torch.bfloat16), quantized, scale)
    except (AttributeError, RuntimeError):
        restored = quantized.to(weight.dtype) * scale.to(weight.dtype)[:, None]
        return lambda x: F.linear(x, restored)
    return lambda x: torch._weight_int8pack_mm(x.bfloat16(), quantized, scale).to(x.dtype)
