"""What makes one machine fast, for as long as a training loop runs.

Products of float32 matrices and convolutions may round their factors: to TF32 on a GPU, to bfloat16 on a CPU with AMX, which
multiplies it several times as fast. Sums stay float32, and so do weights, activations and losses. A CPU that knows bfloat16 and has
no AMX gives the products to oneDNN in the same way, which there rounds nothing and is up to a fifth faster than what torch takes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

CUDNN: Any = torch.backends.cudnn  # modules only at first sight
MKLDNN: Any = torch.backends.mkldnn


def supports_bf16_matmul() -> bool:
    """Whether this CPU does; on others bfloat16 products can be hundreds of times slower than float32."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def supports_bf16_convolution() -> bool:
    """Whether this CPU gains from it in convolutions too: it has AMX."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


@contextmanager
def reduced_matmul_precision(device: torch.device, enabled: bool) -> Iterator[None]:
    """Within it, products of float32 on `device` round their factors where that is faster."""
    settings: dict[Any, bool]
    if device.type == "cuda":
        settings, precision = {torch.backends.cuda.matmul: True, CUDNN.conv: True}, "tf32"
    else:
        settings, precision = {MKLDNN.matmul: supports_bf16_matmul(), MKLDNN.conv: supports_bf16_convolution()}, "bf16"
        enabled = enabled and device.type == "cpu"
    before = {setting: setting.fp32_precision for setting in settings}
    try:
        for setting, gains in settings.items():
            if enabled and gains:
                setting.fp32_precision = precision
        yield
    finally:
        for setting, value in before.items():
            setting.fp32_precision = value


@contextmanager
def full_matmul_precision(device: torch.device) -> Iterator[None]:
    """Within it, products of float32 matrices on `device` round nothing, whatever is set around it."""
    setting: Any = torch.backends.cuda.matmul if device.type == "cuda" else MKLDNN.matmul
    before, setting.fp32_precision = setting.fp32_precision, "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before


def uses_bf16_matmul(device: torch.device) -> bool:
    """Whether products on a CPU may be in bfloat16 now, and are fast in it."""
    return device.type == "cpu" and MKLDNN.matmul.fp32_precision == "bf16"


def uses_bf16_convolution(device: torch.device) -> bool:
    return device.type == "cpu" and MKLDNN.conv.fp32_precision == "bf16"
