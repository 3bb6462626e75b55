"""glibc's allocator, told to keep what tensors free."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3)


def keep_freed_memory() -> None:
    """Lets glibc keep the blocks that tensors free, up to 32 MiB each, for the next ones.

    Otherwise it hands them back to the system, and the pages of every large activation are mapped and cleared anew in each
    step, which took up to half of it. The process stays as large as it once was.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in ((M_MMAP_THRESHOLD, 1 << 25), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 1 << 26)):
            libc.mallopt(parameter, value)
