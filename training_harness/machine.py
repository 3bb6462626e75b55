"""What makes one machine fast, for as long as a training loop runs.

Products of float32 matrices and convolutions may round their factors: to TF32 on a GPU, to bfloat16 on a CPU with AMX, which
multiplies it several times as fast. Sums stay float32, and so do weights, activations and losses.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

CUDNN: Any = torch.backends.cudnn  # modules only at first sight
MKLDNN: Any = torch.backends.mkldnn
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3)


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


def products_are_rounded(device: torch.device) -> bool:
    """Whether products of float32 on a CPU round their factors to bfloat16 now."""
    return device.type == "cpu" and MKLDNN.matmul.fp32_precision == "bf16"


def keep_freed_memory() -> None:
    """Lets glibc keep the blocks that tensors free, up to 32 MiB each, for the next ones.

    Otherwise it hands them back to the system, and the pages of every large activation are mapped and cleared anew in each
    step, which took up to half of it. The process stays as large as it once was.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in ((M_MMAP_THRESHOLD, 1 << 25), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 1 << 26)):
            libc.mallopt(parameter, value)
