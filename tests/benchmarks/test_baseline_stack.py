"""The baseline stack works as described: a fair comparison needs a working baseline."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from tiny_models import seeded
from torch import Tensor

pytest.importorskip("diffusers", reason="the peers of the benchmarks are in the extra `bench`")
import baseline_stack
from baseline_stack import Tuning

TINY = replace(Tuning(), channels=(16, 16, 16), hidden_size=32, layers=1, heads=2, intermediate_size=32)


@contextmanager
def one_step_per_second() -> Iterator[None]:
    """Replace the clock: the stack trains for a number of seconds, which then is the same number of steps on any machine."""
    ticks = count()
    with patch.object(baseline_stack, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks)))):
        yield


@pytest.fixture(scope="module")
def pixel_values() -> Tensor:
    """Return bright and dark squares, one class each."""
    shade = (torch.arange(64) % 2).view(-1, 1, 1, 1) * 1.6 - 0.8
    return shade + 0.1 * torch.randn(64, 1, 16, 16, generator=seeded(0))


@pytest.fixture(scope="module")
def trained(pixel_values: Tensor) -> baseline_stack.Trained:
    with one_step_per_second():
        return baseline_stack.train_tokenizer(pixel_values, 100.0, TINY, seed=0)


def test_decoded_codes_equal_the_output_of_its_forward_pass(
    trained: baseline_stack.Trained, pixel_values: Tensor
) -> None:
    tokens = baseline_stack.encode(trained.model, pixel_values, batch_size=24)
    assert tokens.shape == (64, 16)
    assert 0 <= tokens.min() <= tokens.max() < baseline_stack.CODES
    with torch.no_grad():
        forward = trained.model(pixel_values).sample
    reconstructions = baseline_stack.decode(trained.model, tokens, batch_size=24)
    expected = (forward * 127.5 + 127.5).round().clamp(0, 255)
    assert (reconstructions.float() - expected).abs().max() <= 1


def test_the_tokenizer_learns(trained: baseline_stack.Trained, pixel_values: Tensor) -> None:
    reconstructions = (
        baseline_stack.decode(trained.model, baseline_stack.encode(trained.model, pixel_values)).float() / 127.5 - 1
    )
    assert trained.steps == 99
    assert (reconstructions - pixel_values).square().mean() < 0.5 * pixel_values.var()


def test_the_prior_learns_the_class_and_never_samples_a_class_token() -> None:
    labels = torch.arange(64) % 2
    tokens = (labels[:, None] * 7 + 3).expand(-1, 6)
    with one_step_per_second():
        prior = baseline_stack.train_prior(tokens, labels, 100.0, replace(TINY, prior_rate=1e-2), seed=0)
    for scale in (1.0, 2.0):
        samples = baseline_stack.sample(prior.model, torch.tensor([0, 1, 1, 5]), 6, scale, batch_size=3)
        assert samples.shape == (4, 6)
        assert samples.max() < baseline_stack.CODES
        assert (samples[:3] == tokens[[0, 1, 1]]).double().mean() > 0.8


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    assert baseline_stack.learning_rate_factor(0.0) == 0
    assert baseline_stack.learning_rate_factor(0.03) == pytest.approx(1, abs=0.01)
    assert baseline_stack.learning_rate_factor(0.5) == pytest.approx(0.5)
    assert baseline_stack.learning_rate_factor(1.0) == pytest.approx(0)
