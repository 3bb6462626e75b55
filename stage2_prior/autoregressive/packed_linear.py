r"""Linear layers with packed weights on a CPU: the memory layout fits the number of input rows.

    y = x Wᵀ,     x (rows, in),   W (out, in)
    one row:   y = Σ_i x_i W_{:, i}     a weighted embedding bag, which reads the table from start to end

With one row, memory bandwidth limits the speed: each weight is read for two operations. torch's embedding bag reads memory faster
than its matmul. With several rows, oneDNN reorders the weights into blocks; here this happens once and not at each call. int8
weights, W ≈ diag(s) Q with s = max |row| / 127, are read in a quarter of the time and multiply activations in bfloat16.

The oneDNN and int8 operators are private to torch. `F.linear` replaces an operator that is missing or fails.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LinearFunction = Callable[[Tensor], Tensor]
# Largest width of a bag: its sum stays in registers, and a CPU without AVX-512 has fewer of them.
MAX_BAG_WIDTH = 256 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 64


def pack_linear(weight: Tensor, rows: int, int8: bool = False) -> LinearFunction:
    """Pack a weight (out, in), and return a function of x (rows, in) that computes x Wᵀ (rows, out).

    Later changes of the weight have no effect on the function.
    """
    weight = weight.detach()
    if int8:
        return _pack_int8(weight)
    if rows == 1:
        return _pack_single_row(weight)
    if (reordered := _reorder_for_onednn(weight, rows)) is None:
        return lambda x: F.linear(x, weight)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, reordered, None, "none", [], "")


def pack_gated_linear(gate: Tensor, up: Tensor, rows: int, int8: bool = False) -> LinearFunction:
    """Pack the weights G and U, and return a function of x that computes SiLU(x Gᵀ) · (x Uᵀ).

    For several rows, oneDNN fuses the activation and the product with its matmuls.
    """
    packed_gate, packed_up = (
        None if rows == 1 or int8 else _reorder_for_onednn(weight.detach(), rows) for weight in (gate, up)
    )
    if packed_gate is not None and packed_up is not None:
        linear = torch.ops.mkldnn._linear_pointwise

        def apply_fused(x: Tensor) -> Tensor:
            return linear.binary(x, linear(x, packed_gate, None, "swish", [], ""), packed_up, None, "mul")

        return apply_fused
    size, gate_and_up = len(gate), pack_linear(torch.cat([gate, up]), rows, int8)

    def apply(x: Tensor) -> Tensor:
        y = gate_and_up(x)
        return F.silu(y.narrow(1, 0, size)).mul_(y.narrow(1, size, size))

    return apply


def _pack_single_row(weight: Tensor) -> LinearFunction:
    size, inputs = weight.shape
    bags = 1
    if size > 1:
        bags = next(count for count in range(2, size + 1) if size % count == 0 and size // count <= MAX_BAG_WIDTH)
    table = weight.new_empty(bags * inputs, size // bags)
    for part, rows in zip(weight.chunk(bags), table.chunk(bags), strict=True):
        rows.copy_(part.T)
    all_rows = torch.arange(bags * inputs, dtype=torch.int32)
    bag_starts, repeated = all_rows[::inputs].contiguous(), weight.new_empty(bags, inputs)
    row_weights = repeated.view(-1)

    def apply(x: Tensor) -> Tensor:
        repeated.copy_(x)
        return torch.embedding_bag(table, all_rows, bag_starts, False, 0, False, row_weights)[0].view(1, -1)

    return apply


def _reorder_for_onednn(weight: Tensor, rows: int) -> Tensor | None:
    """Reorder a weight into the blocks of oneDNN; returns None where torch lacks the operators."""
    try:
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        x = weight.new_zeros(rows, weight.shape[1])
        y = torch.ops.mkldnn._linear_pointwise(x, reordered, None, "swish", [], "")
        torch.ops.mkldnn._linear_pointwise.binary(x, y, reordered, None, "mul")
    except (AttributeError, RuntimeError):
        return None
    return reordered


def _pack_int8(weight: Tensor) -> LinearFunction:
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)
    quantized, scale = (weight / scale[:, None]).round().to(torch.int8), scale.bfloat16()
    try:
        torch._weight_int8pack_mm(torch.zeros(1, weight.shape[1], dtype=torch.bfloat16), quantized, scale)
    except (AttributeError, RuntimeError):
        dequantized = quantized.to(weight.dtype) * scale.to(weight.dtype)[:, None]
        return lambda x: F.linear(x, dequantized)
    return lambda x: torch._weight_int8pack_mm(x.bfloat16(), quantized, scale).to(x.dtype)
