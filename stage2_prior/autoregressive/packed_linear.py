r"""Products with a fixed matrix on a CPU, laid out for the number of rows that come at once.

    y = x Wᵀ,     x (rows, in),   W (out, in)
    one row:   y = Σ_i x_i W_{:, i}     a weighted bag of the rows of an embedding table, read from beginning to end

A row alone reads the whole matrix for two operations a number, so memory decides, and torch's bags read it faster than its products
do. Several rows are a small product, for which oneDNN lays the matrix out in blocks once; elsewhere that is done at each call.
Eight-bit weights, W ≈ diag(s) Q with s = max |row| / 127, are read in a quarter of the time and multiply activations in bfloat16.
Those of oneDNN and of eight bits are private to torch; where one is missing, or fails, the plain product stands in.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LinearFunction = Callable[[Tensor], Tensor]
# Numbers of a bag at most: its sum stays in registers, of which a CPU without AVX-512 has an eighth.
BAG = 256 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 64


def pack_linear(weight: Tensor, rows: int, int8: bool = False) -> LinearFunction:
    """A function of x (rows, in) that gives x Wᵀ (rows, out) for the weight (out, in) as it is now."""
    weight = weight.detach()
    if int8:
        return _pack_int8(weight)
    if rows == 1:
        return _pack_single_row(weight)
    if (blocked := _reorder_for_onednn(weight, rows)) is None:
        return lambda x: F.linear(x, weight)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, blocked, None, "none", [], "")


def pack_gated_linear(gate: Tensor, up: Tensor, rows: int, int8: bool = False) -> LinearFunction:
    """A function of x that gives SiLU(x Gᵀ) · (x Uᵀ); of several rows oneDNN does it as it writes the products."""
    of_gate, of_up = (
        None if rows == 1 or int8 else _reorder_for_onednn(weight.detach(), rows) for weight in (gate, up)
    )
    if of_gate is not None and of_up is not None:
        multiply = torch.ops.mkldnn._linear_pointwise

        def fused(x: Tensor) -> Tensor:
            return multiply.binary(x, multiply(x, of_gate, None, "swish", [], ""), of_up, None, "mul")

        return fused
    size, both = len(gate), pack_linear(torch.cat([gate, up]), rows, int8)

    def product(x: Tensor) -> Tensor:
        y = both(x)
        return F.silu(y.narrow(1, 0, size)).mul_(y.narrow(1, size, size))

    return product


def _pack_single_row(weight: Tensor) -> LinearFunction:
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


def _reorder_for_onednn(weight: Tensor, rows: int) -> Tensor | None:
    """The weight in the blocks that oneDNN reads; none where this torch has no such operators."""
    try:
        blocked = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        x = weight.new_zeros(rows, weight.shape[1])
        y = torch.ops.mkldnn._linear_pointwise(x, blocked, None, "swish", [], "")
        torch.ops.mkldnn._linear_pointwise.binary(x, y, blocked, None, "mul")
    except (AttributeError, RuntimeError):
        return None
    return blocked


def _pack_int8(weight: Tensor) -> LinearFunction:
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)
    quantized, scale = (weight / scale[:, None]).round().to(torch.int8), scale.bfloat16()
    try:
        torch._weight_int8pack_mm(torch.zeros(1, weight.shape[1], dtype=torch.bfloat16), quantized, scale)
    except (AttributeError, RuntimeError):
        restored = quantized.to(weight.dtype) * scale.to(weight.dtype)[:, None]
        return lambda x: F.linear(x, restored)
    return lambda x: torch._weight_int8pack_mm(x.bfloat16(), quantized, scale).to(x.dtype)
