"""Matmul precision during training.

With reduced precision, float32 matrix products and convolutions round their factors: to TF32 on a GPU, to bfloat16 on a CPU with
AMX, which multiplies bfloat16 several times as fast. Accumulation, weights, activations and losses stay float32. On a CPU with
bfloat16 instructions but without AMX, the same setting selects oneDNN's float32 kernels: they round nothing and are up to a fifth
faster than torch's default.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

CUDNN: Any = torch.backends.cudnn  # Any: type checkers see modules without these attributes
MKLDNN: Any = torch.backends.mkldnn


def supports_bf16_matmul() -> bool:
    """Return whether this CPU has bfloat16 instructions; without them bfloat16 can be hundreds of times slower."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def supports_bf16_convolution() -> bool:
    """Return whether this CPU has AMX, which makes bfloat16 convolutions faster too."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


@contextmanager
def reduced_matmul_precision(device: torch.device, enabled: bool) -> Iterator[None]:
    """Allow reduced precision of float32 products on `device` within the block, if it is faster."""
    settings: dict[Any, bool]
    if device.type == "cuda":
        settings, precision = {torch.backends.cuda.matmul: True, CUDNN.conv: True}, "tf32"
    else:
        settings, precision = {MKLDNN.matmul: supports_bf16_matmul(), MKLDNN.conv: supports_bf16_convolution()}, "bf16"
        enabled = enabled and device.type == "cpu"
    before = {setting: setting.fp32_precision for setting in settings}
    try:
        for setting, is_faster in settings.items():
            if enabled and is_faster:
                setting.fp32_precision = precision
        yield
    finally:
        for setting, value in before.items():
            setting.fp32_precision = value


@contextmanager
def full_matmul_precision(device: torch.device) -> Iterator[None]:
    """Compute float32 matrix products on `device` in full precision within the block."""
    setting: Any = torch.backends.cuda.matmul if device.type == "cuda" else MKLDNN.matmul
    before, setting.fp32_precision = setting.fp32_precision, "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before


def uses_bf16_matmul(device: torch.device) -> bool:
    """Return whether matrix products on a CPU may use bfloat16 now; False for other devices."""
    return device.type == "cpu" and MKLDNN.matmul.fp32_precision == "bf16"


def uses_bf16_convolution(device: torch.device) -> bool:
    """Return whether convolutions on a CPU may use bfloat16 now; False for other devices."""
    return device.type == "cpu" and MKLDNN.conv.fp32_precision == "bf16"
