"""The cross-entropy in chunks, compared with `F.cross_entropy`."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import seeded
from torch.testing import assert_close

from stage2_prior.autoregressive import token_loss
from stage2_prior.autoregressive.token_loss import head_cross_entropy


def make_batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(37, 8, generator=seeded(0), dtype=dtype).requires_grad_()
    weight = torch.randn(20, 8, generator=seeded(1), dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(20, (37,), generator=seeded(2))


@pytest.mark.parametrize("chunk_size", [1, 7 * 20, 10**9])
def test_the_chunked_loss_equals_the_plain_one_in_value_and_gradient(
    chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(token_loss.LOGITS_PER_CHUNK, "cpu", chunk_size)
    hidden, weight, targets = make_batch()
    ours, plain = head_cross_entropy(hidden, weight, targets), F.cross_entropy(hidden @ weight.T, targets)
    assert_close(ours, plain)
    gradients = [torch.autograd.grad(3 * loss, (hidden, weight)) for loss in (ours, plain)]
    for our_grad, their_grad in zip(*gradients, strict=True):
        assert_close(our_grad, their_grad)


def test_the_gradient_equals_finite_differences() -> None:
    hidden, weight, targets = make_batch()
    assert torch.autograd.gradcheck(lambda h, w: head_cross_entropy(h, w, targets), (hidden, weight))


def test_at_most_one_chunk_of_logits_is_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(token_loss.LOGITS_PER_CHUNK, "cpu", 5 * 20)
    chunks, linear = [], F.linear

    def record_chunk(*arguments: torch.Tensor) -> torch.Tensor:
        chunks.append(linear(*arguments))
        return chunks[-1]

    monkeypatch.setattr(F, "linear", record_chunk)
    head_cross_entropy(*make_batch())
    assert [len(logits) for logits in chunks] == [5] * 7 + [2]


def test_the_gradient_in_half_precision_does_not_underflow_for_a_large_batch() -> None:
    # If they were divided by N first, probabilities of 1 / K would underflow to 0 in float16 above about N·K = 10⁷.
    hidden = torch.zeros(4096, 4, dtype=torch.float16).fill_(0.1).requires_grad_()
    weight = torch.randn(4096, 4, generator=seeded(0)).half().requires_grad_()
    targets = torch.arange(4096)
    (hidden_grad,) = torch.autograd.grad(1024 * head_cross_entropy(hidden, weight, targets), hidden)
    wide = hidden.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(1024 * F.cross_entropy(wide @ weight.float().T, targets), wide)
    assert_close(hidden_grad.float(), expected, rtol=0.02, atol=1e-3)


def test_the_loss_is_the_same_without_gradients() -> None:
    hidden, weight, targets = make_batch()
    with torch.no_grad():
        assert_close(head_cross_entropy(hidden, weight, targets), F.cross_entropy(hidden @ weight.T, targets))
