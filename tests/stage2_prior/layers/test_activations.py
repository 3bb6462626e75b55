"""GELU computed with a sigmoid, compared with torch's tanh approximation in value and gradient."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import seeded
from torch.autograd import forward_ad
from torch.testing import assert_close

from stage2_prior.layers import activations
from stage2_prior.layers.activations import GELU


def test_values_and_gradients_equal_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "CHUNK_SIZE", 64)  # 11 chunks, the last one shorter
    inputs, gradient = (4 * torch.randn(7, 97, generator=seeded(i)) for i in range(2))
    for x in (inputs, inputs.T):  # contiguous and not
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        ours, theirs = GELU()(leaves[0]), F.gelu(leaves[1], approximate="tanh")
        assert_close(ours, theirs)
        for output in (ours, theirs):
            output.backward(gradient.view_as(output))
        assert_close(leaves[0].grad, leaves[1].grad)


def test_the_gradient_equals_finite_differences() -> None:
    assert torch.autograd.gradcheck(GELU(), torch.linspace(-6, 6, 40, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_equals_the_rounded_float32_result(dtype: torch.dtype) -> None:
    x = 60 * torch.randn(200, generator=seeded(0))  # cubes overflow float16
    assert_close(GELU()(x.to(dtype)), F.gelu(x.to(dtype).float(), approximate="tanh").to(dtype))


def test_gelu_supports_forward_mode_derivatives() -> None:
    x, direction = torch.randn(2, 50, generator=seeded(0))
    with forward_ad.dual_level():
        actual = forward_ad.unpack_dual(GELU()(forward_ad.make_dual(x, direction))).tangent
    leaf = x.clone().requires_grad_()
    F.gelu(leaf, approximate="tanh").backward(direction)
    assert_close(actual, leaf.grad)
