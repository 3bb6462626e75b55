"""The losses equal the formulas of the papers, and the adversarial schedule takes steps or shares of the run."""

import math

import pytest
import torch
from small_parts import error_message
from tiny_models import seeded
from torch.nn import functional as F

from stage1_tokenizer.autoencoder_kl import gaussian_divergence
from stage1_tokenizer.losses.adversarial import (
    AdversarialConfig,
    LeCAM,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)
from stage1_tokenizer.losses.reconstruction import CHARBONNIER_EPSILON, ReconstructionConfig, reconstruction_terms
from stage1_tokenizer.networks.discriminator import PatchDiscriminator, smallest_image_side
from training_harness.errors import ConfigError


def test_the_adaptive_weight_is_the_ratio_of_the_gradient_norms_at_the_last_layer():
    layer = torch.randn(2, 3, generator=seeded(0)).requires_grad_()
    reconstruction = (layer * torch.tensor([[3.0, 0, 0], [0, 4.0, 0]])).sum()  # gradient of norm 5
    adversarial = (layer * torch.tensor([[0, 0, 2.0], [0, 0, 0]])).sum()  # of norm 2
    weight = adaptive_weight(reconstruction, adversarial, layer)
    assert weight.item() == pytest.approx(5 / (2 + 1e-4))
    assert not weight.requires_grad
    (reconstruction + adversarial).backward()  # adaptive_weight did not free the graphs
    assert layer.grad.norm() == pytest.approx((25 + 4) ** 0.5)


def test_the_adaptive_weight_is_bounded_when_the_adversarial_loss_has_no_gradient():
    layer = torch.ones(2, requires_grad=True)
    assert adaptive_weight(5 * layer.sum(), 0 * layer.sum(), layer).item() == 1e4


def test_hinge_losses_equal_values_computed_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    expected = 0.5 * (0 + 0.5 + 2) / 3 + 0.5 * (0 + 1 + 2) / 3
    assert discriminator_loss("hinge", real, fake).item() == pytest.approx(expected)
    assert generator_loss("hinge", fake).item() == pytest.approx(1 / 3)
    assert discriminator_loss("hinge", torch.tensor([1.0]), torch.tensor([-1.0])).item() == 0  # beyond the margin


@pytest.mark.parametrize("kind", ["vanilla", "non_saturating"])
def test_vanilla_and_non_saturating_losses_equal_cross_entropies(kind):
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([-2.0, 0.5])
    p_real, p_fake = torch.sigmoid(real), torch.sigmoid(fake)
    expected = -0.5 * p_real.log().mean() - 0.5 * (1 - p_fake).log().mean()
    assert discriminator_loss(kind, real, fake).item() == pytest.approx(expected.item())
    generator = {"vanilla": (1 - p_fake).log().mean(), "non_saturating": -p_fake.log().mean()}[kind]
    assert generator_loss(kind, fake).item() == pytest.approx(generator.item())


def test_only_the_vanilla_gradient_vanishes_against_a_confident_discriminator():
    gradients = {}
    for kind in ("hinge", "vanilla", "non_saturating"):
        logits = torch.tensor([-12.0], requires_grad=True)
        generator_loss(kind, logits).backward()
        gradients[kind] = logits.grad.item()
    assert all(gradient < 0 for gradient in gradients.values())  # all losses fall when the logit rises
    assert gradients["vanilla"] == pytest.approx(-math.exp(-12), rel=1e-3)
    assert gradients["hinge"] == -1
    assert gradients["non_saturating"] == pytest.approx(-1, abs=1e-4)


def test_r1_is_half_the_squared_gradient_norm_at_the_real_images_only():
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0])
    images = torch.randn(6, 1, 2, 2, generator=seeded(0)).requires_grad_()  # three real and three fake images
    logits = (images.flatten(1) * weight).sum(1) ** 2  # gradient 2 (w·x) w
    real = images[:3].detach().flatten(1)
    expected = 0.5 * (2 * (real @ weight)[:, None] * weight).square().sum(1).mean()
    assert r1_penalty(logits[:3], images).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_r1_gradient_reaches_the_weights_of_the_discriminator():
    discriminator = PatchDiscriminator(1, 8, 1)
    images = torch.randn(4, 1, 12, 12, generator=seeded(0)).requires_grad_()
    penalty = r1_penalty(discriminator(images)[:2], images)
    penalty.backward()
    first_weight = discriminator[0].weight
    assert float(first_weight.grad.abs().sum()) > 0
    with torch.no_grad():
        first_weight.sub_(1e-4 * first_weight.grad / first_weight.grad.norm())
    assert r1_penalty(discriminator(images)[:2], images) < penalty


def test_lecam_averages_the_logits_and_pulls_real_and_fake_logits_to_each_other():
    lecam = LeCAM()
    for _ in range(2000):
        lecam.penalty(torch.tensor([2.0, 4.0]), torch.tensor([-1.0, -3.0]))
    assert (lecam.real, lecam.fake) == (pytest.approx(3), pytest.approx(-2))
    real, fake = torch.tensor([1.0], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    penalty = lecam.penalty(real, fake)
    assert penalty.item() == pytest.approx((1 - lecam.fake) ** 2 + (0 - lecam.real) ** 2)
    penalty.backward()
    assert (real.grad.item(), fake.grad.item()) == (pytest.approx(6, rel=1e-2), pytest.approx(-6, rel=1e-2))
    before = lecam.state_dict()
    lecam.penalty(torch.tensor([math.nan]), fake)
    assert lecam.state_dict() == before
    restored = LeCAM()
    restored.load_state_dict(before)
    assert restored.penalty(real, fake).item() == lecam.penalty(real, fake).item()


def test_charbonnier_is_absolute_for_large_errors_and_squared_for_small_errors():
    weights = ReconstructionConfig(l1=0.0, l2=0.0, charbonnier=1.0)

    def compute_loss(error: float) -> float:
        images = torch.zeros(1, 1, 2, 2)
        return reconstruction_terms(images + error, images, weights, None)["charbonnier"].item()

    assert compute_loss(1.0) == pytest.approx(1.0, rel=1e-5)
    small_error = CHARBONNIER_EPSILON / 10
    expected = small_error**2 / (2 * CHARBONNIER_EPSILON)
    assert compute_loss(small_error) - compute_loss(0) == pytest.approx(expected, rel=1e-2)


def test_gaussian_divergence_equals_torch_distributions():
    mean, log_variance = (torch.randn(5, 7, generator=seeded(i)) for i in (0, 1))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (0.5 * log_variance).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(gaussian_divergence(mean, log_variance), expected)
    assert gaussian_divergence(torch.zeros(1), torch.zeros(1)).item() == 0


def test_reconstruction_terms_are_unweighted_float32_means_for_bfloat16_inputs():
    x, y = (torch.rand(2, 3, 4, 4, generator=seeded(i)) for i in (0, 1))
    weights = ReconstructionConfig()
    terms = reconstruction_terms(x.bfloat16(), y, weights, lambda a, b: (a - b).amax())
    assert list(terms) == ["l1", "l2", "perceptual"]
    assert all(term.dtype == torch.float32 and term.ndim == 0 for term in terms.values())
    difference = x.bfloat16().float() - y
    assert terms["l1"].item() == pytest.approx(difference.abs().mean().item())
    assert terms["l2"].item() == pytest.approx(difference.square().mean().item())
    assert "perceptual" not in reconstruction_terms(x, y, weights, None)


@pytest.mark.parametrize("start", [100, 0.25])
@pytest.mark.parametrize("warmup", [40, 0.1])
@pytest.mark.parametrize("ramp", [80, 0.2])
def test_the_adversarial_schedule_is_equal_in_steps_and_in_shares_of_the_run(start, warmup, ramp):
    config = AdversarialConfig(weight=0.5, start=start, warmup=warmup, ramp=ramp)
    assert [config.trains_discriminator(step, 400) for step in (1, 100, 101, 400)] == [False, False, True, True]
    factors = [config.ramp_factor(step, 400) for step in (1, 100, 140, 141, 180, 220, 400)]
    assert factors == pytest.approx([0, 0, 0, 1 / 80, 0.5, 1, 1])


def test_an_int_is_a_step_and_a_float_is_a_share_of_the_run():
    assert AdversarialConfig(weight=1, start=1).trains_discriminator(2, 400)
    assert not AdversarialConfig(weight=1, start=1.0).trains_discriminator(400, 400)


def test_without_a_ramp_the_factor_is_1_at_once_and_without_a_weight_it_stays_0():
    assert AdversarialConfig(weight=1, start=10, warmup=0, ramp=0).ramp_factor(11, 100) == 1
    assert AdversarialConfig(weight=0, start=0, warmup=0).ramp_factor(100, 100) == 0
    assert not AdversarialConfig(weight=0, start=0).trains_discriminator(100, 100)


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (AdversarialConfig, {"start": 1.5}),
        (AdversarialConfig, {"warmup": -1}),
        (AdversarialConfig, {"weight": -0.1}),
        (AdversarialConfig, {"channels": 0}),
        (AdversarialConfig, {"layers": -1}),
        (AdversarialConfig, {"lecam": -0.1}),
        (AdversarialConfig, {"r1": -1.0}),
        (ReconstructionConfig, {"kl": -1.0}),
        (ReconstructionConfig, {"l1": -1.0}),
        (ReconstructionConfig, {"l1": 0.0, "l2": 0.0}),
    ],
)
def test_an_invalid_value_gives_one_line_with_the_field_and_the_value(cls, fields):
    with pytest.raises(ConfigError) as caught:
        cls(**fields)
    name, value = next(iter(fields.items()))
    assert name in error_message(caught)
    assert f"{value:g}" in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "size", "logits"), [(3, (32, 48), (2, 4)), (2, (32, 32), (6, 6)), (1, (8, 8), (2, 2))]
)
def test_the_discriminator_returns_one_logit_per_overlapping_patch(layers, size, logits):
    assert PatchDiscriminator(3, 8, layers)(torch.zeros(2, 3, *size)).shape == (2, 1, *logits)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_discriminator_accepts_the_smallest_image_side_and_no_smaller_one(layers):
    side, discriminator = smallest_image_side(layers), PatchDiscriminator(1, 4, layers)
    assert discriminator(torch.zeros(1, 1, side, side)).numel() == 1
    with pytest.raises(RuntimeError):
        discriminator(torch.zeros(1, 1, side - 1, side - 1))


def test_the_discriminator_learns_to_separate_sharp_and_blurred_images():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(1, 8, 1)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    real = torch.rand(16, 1, 12, 12, generator=seeded(0))
    fake = F.avg_pool2d(real, 3, 1, 1)  # blurred, like early reconstructions
    for _ in range(30):
        optimizer.zero_grad()
        discriminator_loss("hinge", discriminator(real), discriminator(fake)).backward()
        optimizer.step()
    assert discriminator(real).mean() > 0.2 > -0.2 > discriminator(fake).mean()
