"""What makes one machine fast, for as long as a training loop runs.

Products of float32 matrices and convolutions may round their factors: to TF32 on a GPU, to bfloat16 on a CPU with AMX, which
multiplies it several times as fast. Sums stay float32, and so do weights, activations and losses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

CUDNN: Any = torch.backends.cudnn  # modules only at first sight
MKLDNN: Any = torch.backends.mkldnn


def multiplies_bfloat16() -> bool:
    """Whether this CPU has AMX; on others bfloat16 products can be hundreds of times slower than float32."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


@contextmanager
def rounded_products(device: torch.device, enabled: bool) -> Iterator[None]:
    """Within it, products of float32 on `device` round their factors where that is faster."""
    settings: tuple[Any, Any]
    if device.type == "cuda":
        settings, precision = (torch.backends.cuda.matmul, CUDNN.conv), "tf32"
    else:
        settings, precision = (MKLDNN.matmul, MKLDNN.conv), "bf16"
        enabled = enabled and device.type == "cpu" and multiplies_bfloat16()
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings if enabled else ():
            setting.fp32_precision = precision
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Within it, products of float32 matrices on `device` round nothing, whatever is set around it."""
    setting: Any = torch.backends.cuda.matmul if device.type == "cuda" else MKLDNN.matmul
    before, setting.fp32_precision = setting.fp32_precision, "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before


def products_are_rounded(device: torch.device) -> bool:
    """Whether products of float32 on a CPU round their factors to bfloat16 now."""
    return device.type == "cpu" and MKLDNN.matmul.fp32_precision == "bf16"
