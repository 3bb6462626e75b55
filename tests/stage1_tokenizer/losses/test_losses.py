"""The losses are those of the papers, by hand; a share of the run and a step mean the same."""

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


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_at_the_last_layer():
    layer = torch.randn(2, 3, generator=seeded(0)).requires_grad_()
    reconstruction = (layer * torch.tensor([[3.0, 0, 0], [0, 4.0, 0]])).sum()  # gradient of norm 5
    adversarial = (layer * torch.tensor([[0, 0, 2.0], [0, 0, 0]])).sum()  # of norm 2
    weight = adaptive_weight(reconstruction, adversarial, layer)
    assert weight.item() == pytest.approx(5 / (2 + 1e-4))
    assert not weight.requires_grad
    (reconstruction + adversarial).backward()  # both graphs are still there
    assert layer.grad.norm() == pytest.approx((25 + 4) ** 0.5)


def test_the_adaptive_weight_is_bounded_where_the_adversary_has_no_gradient():
    layer = torch.ones(2, requires_grad=True)
    assert adaptive_weight(5 * layer.sum(), 0 * layer.sum(), layer).item() == 1e4


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    expected = 0.5 * (0 + 0.5 + 2) / 3 + 0.5 * (0 + 1 + 2) / 3
    assert discriminator_loss("hinge", real, fake).item() == pytest.approx(expected)
    assert generator_loss("hinge", fake).item() == pytest.approx(1 / 3)
    assert discriminator_loss("hinge", torch.tensor([1.0]), torch.tensor([-1.0])).item() == 0  # beyond the margin


@pytest.mark.parametrize("kind", ["vanilla", "non_saturating"])
def test_the_losses_of_probabilities_are_cross_entropies_by_hand(kind):
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([-2.0, 0.5])
    of_real, of_fake = torch.sigmoid(real), torch.sigmoid(fake)
    expected = -0.5 * of_real.log().mean() - 0.5 * (1 - of_fake).log().mean()
    assert discriminator_loss(kind, real, fake).item() == pytest.approx(expected.item())
    generator = {"vanilla": (1 - of_fake).log().mean(), "non_saturating": -of_fake.log().mean()}[kind]
    assert generator_loss(kind, fake).item() == pytest.approx(generator.item())


def test_against_a_sure_discriminator_the_vanilla_gradient_vanishes_and_the_others_do_not():
    gradients = {}
    for kind in ("hinge", "vanilla", "non_saturating"):
        logits = torch.tensor([-12.0], requires_grad=True)
        generator_loss(kind, logits).backward()
        gradients[kind] = logits.grad.item()
    assert all(gradient < 0 for gradient in gradients.values())  # all want a higher logit
    assert gradients["vanilla"] == pytest.approx(-math.exp(-12), rel=1e-3)
    assert gradients["hinge"] == -1
    assert gradients["non_saturating"] == pytest.approx(-1, abs=1e-4)


def test_r1_is_half_the_squared_gradient_at_the_real_images_alone():
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0])
    pair = torch.randn(6, 1, 2, 2, generator=seeded(0)).requires_grad_()  # three real ones, then three others
    logits = (pair.flatten(1) * weight).sum(1) ** 2  # gradient 2 (w·x) w
    real = pair[:3].detach().flatten(1)
    expected = 0.5 * (2 * (real @ weight)[:, None] * weight).square().sum(1).mean()
    assert r1_penalty(logits[:3], pair).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_gradient_of_r1_reaches_the_discriminator_s_weights():
    critic = PatchDiscriminator(1, 8, 1)
    pair = torch.randn(4, 1, 12, 12, generator=seeded(0)).requires_grad_()
    penalty = r1_penalty(critic(pair)[:2], pair)
    penalty.backward()
    first = critic[0].weight
    assert float(first.grad.abs().sum()) > 0
    with torch.no_grad():
        first.sub_(1e-4 * first.grad / first.grad.norm())
    assert r1_penalty(critic(pair)[:2], pair) < penalty


def test_lecam_follows_the_logits_and_pulls_each_kind_to_where_the_other_was():
    lecam = LeCAM()
    for _ in range(2000):
        lecam.penalty(torch.tensor([2.0, 4.0]), torch.tensor([-1.0, -3.0]))
    assert (lecam.real, lecam.fake) == (pytest.approx(3), pytest.approx(-2))
    real, fake = torch.tensor([1.0], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    found = lecam.penalty(real, fake)
    assert found.item() == pytest.approx((1 - lecam.fake) ** 2 + (0 - lecam.real) ** 2)
    found.backward()
    assert (real.grad.item(), fake.grad.item()) == (pytest.approx(6, rel=1e-2), pytest.approx(-6, rel=1e-2))
    before = lecam.state_dict()
    lecam.penalty(torch.tensor([math.nan]), fake)
    assert lecam.state_dict() == before
    other = LeCAM()
    other.load_state_dict(before)
    assert other.penalty(real, fake).item() == lecam.penalty(real, fake).item()


def test_charbonnier_is_absolute_for_large_errors_and_squared_for_small_ones():
    weights = ReconstructionConfig(l1=0.0, l2=0.0, charbonnier=1.0)

    def of(error: float) -> float:
        images = torch.zeros(1, 1, 2, 2)
        return reconstruction_terms(images + error, images, weights, None)["charbonnier"].item()

    assert of(1.0) == pytest.approx(1.0, rel=1e-5)
    small = CHARBONNIER_EPSILON / 10
    assert of(small) - of(0) == pytest.approx(small**2 / (2 * CHARBONNIER_EPSILON), rel=1e-2)


def test_the_divergence_is_that_of_torch_distributions():
    mean, log_variance = (torch.randn(5, 7, generator=seeded(i)) for i in (0, 1))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (0.5 * log_variance).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(gaussian_divergence(mean, log_variance), expected)
    assert gaussian_divergence(torch.zeros(1), torch.zeros(1)).item() == 0


def test_reconstruction_terms_are_unweighted_float32_means_even_of_bfloat16():
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
def test_the_discriminator_s_timetable_is_the_same_in_steps_and_in_shares_of_400(start, warmup, ramp):
    config = AdversarialConfig(weight=0.5, start=start, warmup=warmup, ramp=ramp)
    assert [config.discriminating(step, 400) for step in (1, 100, 101, 400)] == [False, False, True, True]
    shares = [config.share(step, 400) for step in (1, 100, 140, 141, 180, 220, 400)]
    assert shares == pytest.approx([0, 0, 0, 1 / 80, 0.5, 1, 1])


def test_one_means_a_step_and_one_point_nought_the_whole_run():
    assert AdversarialConfig(weight=1, start=1).discriminating(2, 400)
    assert not AdversarialConfig(weight=1, start=1.0).discriminating(400, 400)


def test_without_a_ramp_the_term_is_whole_at_once_and_without_a_weight_it_never_comes():
    assert AdversarialConfig(weight=1, start=10, warmup=0, ramp=0).share(11, 100) == 1
    assert AdversarialConfig(weight=0, start=0, warmup=0).share(100, 100) == 0
    assert not AdversarialConfig(weight=0, start=0).discriminating(100, 100)


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
def test_values_that_make_no_sense_are_one_line_with_the_field_and_the_value(cls, fields):
    with pytest.raises(ConfigError) as caught:
        cls(**fields)
    name, value = next(iter(fields.items()))
    assert name in error_message(caught)
    assert f"{value:g}" in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "size", "logits"), [(3, (32, 48), (2, 4)), (2, (32, 32), (6, 6)), (1, (8, 8), (2, 2))]
)
def test_the_discriminator_judges_overlapping_patches(layers, size, logits):
    assert PatchDiscriminator(3, 8, layers)(torch.zeros(2, 3, *size)).shape == (2, 1, *logits)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_picture_that_is_judged_is_judged_and_one_pixel_less_is_not(layers):
    side, critic = smallest_image_side(layers), PatchDiscriminator(1, 4, layers)
    assert critic(torch.zeros(1, 1, side, side)).numel() == 1
    with pytest.raises(RuntimeError):
        critic(torch.zeros(1, 1, side - 1, side - 1))


def test_the_discriminator_learns_to_tell_two_kinds_of_pictures_apart():
    torch.manual_seed(0)
    critic = PatchDiscriminator(1, 8, 1)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
    real = torch.rand(16, 1, 12, 12, generator=seeded(0))
    fake = F.avg_pool2d(real, 3, 1, 1)  # blurred, as early reconstructions are
    for _ in range(30):
        optimizer.zero_grad()
        discriminator_loss("hinge", critic(real), critic(fake)).backward()
        optimizer.step()
    assert critic(real).mean() > 0.2 > -0.2 > critic(fake).mean()
