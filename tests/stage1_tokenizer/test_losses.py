"""The losses are those of the papers, by hand; a share of the run and a step mean the same."""

import pytest
import torch
from small_parts import one_line
from tiny_models import seeded
from torch.nn import functional as F

from stage1_tokenizer.discriminator import PatchDiscriminator, smallest_judged
from stage1_tokenizer.losses import (
    AdversarialConfig,
    ReconstructionConfig,
    adaptive_weight,
    discriminator_hinge,
    generator_hinge,
    reconstruction_terms,
)
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
    assert discriminator_hinge(real, fake).item() == pytest.approx(0.5 * (0 + 0.5 + 2) / 3 + 0.5 * (0 + 1 + 2) / 3)
    assert generator_hinge(fake).item() == pytest.approx(1 / 3)
    assert discriminator_hinge(torch.tensor([1.0]), torch.tensor([-1.0])).item() == 0  # beyond the margin


def test_reconstruction_terms_are_unweighted_float32_means_even_of_bfloat16():
    x, y = (torch.rand(2, 3, 4, 4, generator=seeded(i)) for i in (0, 1))
    terms = reconstruction_terms(x.bfloat16(), y, lambda a, b: (a - b).amax())
    assert list(terms) == ["l1", "l2", "perceptual"]
    assert all(term.dtype == torch.float32 and term.ndim == 0 for term in terms.values())
    difference = x.bfloat16().float() - y
    assert terms["l1"].item() == pytest.approx(difference.abs().mean().item())
    assert terms["l2"].item() == pytest.approx(difference.square().mean().item())
    assert "perceptual" not in reconstruction_terms(x, y, None)


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
        (ReconstructionConfig, {"l1": -1.0}),
        (ReconstructionConfig, {"l1": 0.0, "l2": 0.0}),
    ],
)
def test_values_that_make_no_sense_are_one_line_with_the_field_and_the_value(cls, fields):
    with pytest.raises(ConfigError) as caught:
        cls(**fields)
    name, value = next(iter(fields.items()))
    assert name in one_line(caught)
    assert f"{value:g}" in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "size", "logits"), [(3, (32, 48), (2, 4)), (2, (32, 32), (6, 6)), (1, (8, 8), (2, 2))]
)
def test_the_discriminator_judges_overlapping_patches(layers, size, logits):
    assert PatchDiscriminator(3, 8, layers)(torch.zeros(2, 3, *size)).shape == (2, 1, *logits)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_picture_that_is_judged_is_judged_and_one_pixel_less_is_not(layers):
    side, critic = smallest_judged(layers), PatchDiscriminator(1, 4, layers)
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
        discriminator_hinge(critic(real), critic(fake)).backward()
        optimizer.step()
    assert critic(real).mean() > 0.2 > -0.2 > critic(fake).mean()
