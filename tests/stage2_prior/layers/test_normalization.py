"""RMSNorm with its explicit gradient, compared with torch."""

import torch
from tiny_models import seeded
from torch import nn
from torch.testing import assert_close

from stage2_prior.layers.normalization import RMSNorm


def test_values_and_gradients_equal_torch() -> None:
    ours, theirs = RMSNorm(24, eps=1e-5), nn.RMSNorm(24, eps=1e-5)
    nn.init.normal_(ours.weight, generator=seeded(0))
    theirs.load_state_dict(ours.state_dict())
    x, gradient = (torch.randn(3, 2, 5, 24, generator=seeded(i)) for i in (1, 2))
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [norm(leaf) for norm, leaf in zip((ours, theirs), leaves, strict=True)]
    assert_close(outputs[0], outputs[1])
    for output in outputs:
        output.backward(gradient)
    assert_close(leaves[0].grad, leaves[1].grad)
    assert_close(ours.weight.grad, theirs.weight.grad)


def test_the_gradient_equals_finite_differences() -> None:
    norm = RMSNorm(6, eps=1e-3).double()
    nn.init.normal_(norm.weight, generator=seeded(0))
    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=seeded(1)).requires_grad_()
    assert torch.autograd.gradcheck(norm, x)
    assert torch.autograd.gradcheck(
        lambda weight: torch.func.functional_call(norm, {"weight": weight}, x.detach()), norm.weight
    )


def test_half_precision_is_normalized_in_float32_and_returned_in_its_dtype() -> None:
    norm = RMSNorm(64, eps=1e-6)
    x = 300 * torch.randn(4, 64, generator=seeded(0))
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert_close(norm(x.half()), norm(x).half())  # squares of 300 overflow float16
