"""Reduced matmul precision is limited to its block and accurate enough; the allocator keeps freed memory."""

import subprocess
import sys

import pytest
import torch
from tiny_models import seeded

from training_harness.matmul_precision import reduced_matmul_precision, supports_bf16_convolution, supports_bf16_matmul

CPU = torch.device("cpu")
COUNT_PAGE_FAULTS = """
import resource, torch
from training_harness.allocator import keep_freed_memory
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(1_000_000) for _ in range(20)]  # 4 MB each
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(3):
    faults()
print(sum(faults() for _ in range(5)))
"""


def test_products_have_reduced_precision_within_the_block_and_full_precision_after_it() -> None:
    a, b = (torch.randn(256, 256, generator=seeded(i)) for i in range(2))
    exact = a @ b
    with reduced_matmul_precision(CPU, True):
        reduced = a @ b
    assert torch.equal(a @ b, exact)
    assert supports_bf16_matmul() or torch.equal(reduced, exact)
    # Without AMX only the order of summation may differ.
    assert supports_bf16_convolution() == ((reduced - exact).abs().max() > 1e-3)
    error = (reduced - exact).norm() / exact.norm()
    assert error < 2**-7  # a factor in bfloat16 has 8 bits
    with reduced_matmul_precision(CPU, False):
        assert torch.equal(a @ b, exact)


def test_an_error_in_the_block_restores_the_precision() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), reduced_matmul_precision(CPU, True):
        1 / 0  # noqa: B018
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is available on Linux only")
def test_freed_pages_are_reused_without_page_faults() -> None:
    output = subprocess.run([sys.executable, "-c", COUNT_PAGE_FAULTS], check=True, capture_output=True).stdout
    assert int(output) < 1_000  # of 5 × 20 × 977 pages; the number without the call depends on the history of the heap
