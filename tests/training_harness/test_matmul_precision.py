"""Rounded products stay within their block and near the exact ones; freed memory stays with the process."""

import subprocess
import sys

import pytest
import torch
from tiny_models import seeded

from training_harness.matmul_precision import reduced_matmul_precision, supports_bf16_convolution, supports_bf16_matmul

CPU = torch.device("cpu")
FAULTS = """
import resource, torch
from training_harness.allocator import keep_freed_memory
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del_me = [torch.ones(1_000_000) for _ in range(20)]  # 4 MB each
    del del_me
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(3):
    faults()
print(sum(faults() for _ in range(5)))
"""


def test_products_are_rounded_within_the_block_where_the_cpu_gains_from_it_and_exact_after_it() -> None:
    a, b = (torch.randn(256, 256, generator=seeded(i)) for i in range(2))
    exact = a @ b
    with reduced_matmul_precision(CPU, True):
        inside = a @ b
    assert torch.equal(a @ b, exact)
    assert supports_bf16_matmul() or torch.equal(inside, exact)
    assert supports_bf16_convolution() == (
        (inside - exact).abs().max() > 1e-3
    )  # without AMX sums are taken in another order at most
    error = (inside - exact).norm() / exact.norm()
    assert error < 2**-7  # a factor in bfloat16 has 8 bits
    with reduced_matmul_precision(CPU, False):
        assert torch.equal(a @ b, exact)


def test_products_are_exact_again_after_an_error() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), reduced_matmul_precision(CPU, True):
        1 / 0  # noqa: B018
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
def test_pages_that_were_mapped_once_are_not_mapped_again() -> None:
    found = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True).stdout
    assert int(found) < 1_000  # of 5 × 20 × 977 pages; what happens without the call depends on the heap's history
