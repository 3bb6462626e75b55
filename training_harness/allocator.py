"""Settings of glibc's memory allocator for training."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # parameters of mallopt(3)


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MiB for the next tensors.

    By default glibc returns such blocks to the system. The system then maps and clears the pages of every large activation
    again in each step, which took up to half of the step time. The process keeps its peak size.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in ((M_MMAP_THRESHOLD, 1 << 25), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 1 << 26)):
            libc.mallopt(parameter, value)
