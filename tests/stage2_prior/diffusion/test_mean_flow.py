"""Mean flow: exact mean velocities, the derivative compared with finite differences, and sampling in few steps."""

from typing import Any

import pytest
import torch
from tiny_models import seeded
from torch import Tensor
from torch.testing import assert_close

from stage1_tokenizer.latent_spec import LatentSpec
from stage2_prior.diffusion.config import DiffusionPriorConfig
from stage2_prior.diffusion.mean_flow import MeanFlow, mean_flow_errors, total_derivative
from stage2_prior.diffusion.model import DiffusionPrior
from stage2_prior.diffusion.sampling import DiffusionOptions
from stage2_prior.diffusion.times import TimesConfig
from training_harness.errors import ConfigError, UserError

SMALL: dict[str, Any] = {
    "channels": 3, "height": 4, "width": 4, "num_classes": 5, "hidden_size": 32, "num_layers": 2, "num_heads": 2,
    "intermediate_size": 48, "mean_flow": True,
}  # fmt: skip
VARIANTS: list[dict[str, Any]] = [{}, {"norm": "rms", "feed_forward": "swiglu", "qk_norm": True, "positions": "2d"}]
SPEC = LatentSpec(
    channels=3, height=4, width=4, codebook_size=None, levels=1, image_channels=1, image_height=8, image_width=8,
    downsampling_factor=2, tokenizer_id="",
)  # fmt: skip


def make_prior(**fields: Any) -> DiffusionPrior:
    torch.manual_seed(0)
    prior = DiffusionPrior(DiffusionPriorConfig(**SMALL | fields)).double().eval()
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return prior


def make_examples(count: int = 6) -> dict[str, Tensor]:
    g = seeded(1)
    noisy, velocity = torch.randn(2, count, 3, 4, 4, generator=g, dtype=torch.float64)
    times = torch.rand(count, generator=g, dtype=torch.float64) * 0.8 + 0.1
    return {
        "noisy": noisy,
        "velocity": velocity,
        "times": times,
        "ends": times * torch.rand(count, generator=g, dtype=torch.float64),
        "classes": torch.arange(count) % 5,
        "guidance": 1 + 2 * torch.rand(count, generator=g, dtype=torch.float64),
    }


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_derivative_equals_finite_differences_along_the_predicted_velocity(kind: dict[str, Any]) -> None:
    network, x, h = make_prior(**kind).denoiser, make_examples(), 1e-5
    rest = x["classes"], x["ends"], x["guidance"]
    actual = total_derivative(network, x["noisy"], x["times"], *rest)
    with torch.no_grad():
        direction = network(x["noisy"], x["times"], x["classes"], x["times"], x["guidance"])
        ahead, behind = (network(x["noisy"] + step * direction, x["times"] + step, *rest) for step in (h, -h))
    assert_close(actual, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-7)
    assert actual.abs().mean() > 0.1


def predict_point_data(z: Tensor, t: Tensor, classes: Tensor, ends: Tensor, guidance: Tensor) -> Tensor:
    """Return the exact mean velocity for data at one point, 2: every path is straight, v = (z − 2) / t."""
    return (z - 2) / t.view(-1, 1, 1, 1)


def predict_gaussian_data(z: Tensor, t: Tensor, classes: Tensor, ends: Tensor, guidance: Tensor) -> Tensor:
    """Return the exact mean velocity for N(0, 1) data: z_t has the std s(t) = √((1 − t)² + t²), and z_r = z_t s(r) / s(t)."""
    t, ends = t.view(-1, 1, 1, 1), ends.view(-1, 1, 1, 1)
    at, after = (((1 - time).square() + time.square()).sqrt() for time in (t, ends))
    span = t - ends
    velocity = z * (2 * t - 1) / at.square()
    return torch.where(span == 0, velocity, z * (1 - after / at) / torch.where(span == 0, 1, span))


def test_the_exact_mean_velocity_has_no_error() -> None:
    # For an exact network V − ṽ is v(z_t, t) − ṽ. It is 0 when ṽ is the mean velocity of all examples at z_t.
    x = make_examples()
    ends, ones = x["ends"], torch.ones_like(x["times"])
    for network in (predict_point_data, predict_gaussian_data):
        velocity = network(x["noisy"], x["times"], x["classes"], x["times"], ones)
        errors = mean_flow_errors(network, x["noisy"], velocity, x["times"], x["classes"], 5, ends, ones)
        assert errors.abs().max() < 1e-5
        zero_end_errors = mean_flow_errors(network, x["noisy"], velocity, x["times"], x["classes"], 5, ends * 0, ones)
        assert zero_end_errors.abs().max() < 1e-5  # for any span

    def predict_wrong_spans(z: Tensor, t: Tensor, *rest: Tensor) -> Tensor:
        factor = 1 + (t - rest[1]).view(-1, 1, 1, 1)  # 1 for spans of length 0
        return predict_gaussian_data(z, t, *rest) * factor

    velocity = predict_gaussian_data(x["noisy"], x["times"], x["classes"], x["times"], ones)
    errors = mean_flow_errors(predict_wrong_spans, x["noisy"], velocity, x["times"], x["classes"], 5, ends, ones)
    assert errors.abs().max() > 0.05


def test_the_target_of_a_span_of_length_0_is_the_guided_velocity() -> None:
    x, network = make_examples(), make_prior().denoiser
    classes = x["classes"].clone()
    classes[:2] = torch.tensor([-1, 5])
    with torch.no_grad():
        errors = mean_flow_errors(network, x["noisy"], x["velocity"], x["times"], classes, 5, x["times"], x["guidance"])
        null = network(x["noisy"], x["times"], torch.full_like(classes, 5))
        guidance = torch.where(torch.arange(6) < 2, 1, x["guidance"])  # no guidance without a class
        predicted = network(x["noisy"], x["times"], classes, x["times"], guidance)
        scale = guidance.view(-1, 1, 1, 1)
    assert_close(errors, (predicted - (scale * x["velocity"] + (1 - scale) * null)))


def test_only_the_prediction_has_a_gradient() -> None:
    prior, x = make_prior(), make_examples()
    errors = mean_flow_errors(
        prior.denoiser, x["noisy"], x["velocity"], x["times"], x["classes"], 5, x["ends"], x["guidance"]
    )
    errors.square().sum().backward()
    actual = [p.grad.clone() for p in prior.parameters() if p.grad is not None]
    prior.zero_grad()
    predicted = prior.denoiser(x["noisy"], x["times"], x["classes"], x["ends"], x["guidance"])
    (2 * errors.detach() * predicted).sum().backward()
    for one, other in zip(actual, (p.grad for p in prior.parameters() if p.grad is not None), strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_one_step_with_the_exact_mean_velocity_is_as_good_as_a_thousand() -> None:
    prior = make_prior().float()
    prior.denoiser.forward = lambda z, t, c, r=None, w=None: predict_gaussian_data(z, t, c, t if r is None else r, t)  # type: ignore[method-assign]

    def sample_latents(steps: int, sampler: Any) -> Tensor:
        options = DiffusionOptions(num_inference_steps=steps, sampler=sampler)
        return prior.sample(SPEC, torch.zeros(4, dtype=torch.long), options, [seeded(i) for i in range(4)])

    exact, one, four = sample_latents(1000, "heun"), sample_latents(1, "euler"), sample_latents(4, "euler")
    assert_close(one, exact, rtol=0, atol=1e-4)
    assert_close(four, exact, rtol=0, atol=1e-4)
    assert_close(sample_latents(1, "adams-bashforth"), exact, rtol=0, atol=1e-4)
    assert (sample_latents(1, "ddim") - exact).abs().max() > 0.1


def test_guidance_is_an_input_of_a_mean_flow_and_needs_no_second_evaluation() -> None:
    prior, batches = make_prior().float(), list[tuple[int, float]]()
    own = prior.denoiser.forward

    def record_batch(z: Tensor, t: Tensor, c: Tensor, r: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        assert w is not None
        batches.append((len(z), float(w[0])))
        return own(z, t, c, r, w)

    prior.denoiser.forward = record_batch  # type: ignore[method-assign]
    options = DiffusionOptions(num_inference_steps=4, guidance_scale=3.0)
    prior.sample(SPEC, torch.tensor([0, 1]), options, [seeded(0), seeded(1)])
    assert batches == [(2, 3.0)] * 4
    batches.clear()
    within = DiffusionOptions(num_inference_steps=4, guidance_scale=3.0, guidance_interval=(0.0, 0.7))
    prior.sample(SPEC, torch.tensor([0, 1]), within, [seeded(0), seeded(1)])
    assert batches == [(2, 1.0), *[(2, 3.0)] * 3]  # the spans' middles are at 0.875, 0.625, 0.375 and 0.125


def test_an_image_without_a_class_gets_the_guidance_scale_1() -> None:
    prior, scales = make_prior().float(), list[list[float]]()
    own = prior.denoiser.forward

    def record_guidance(z: Tensor, t: Tensor, c: Tensor, r: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        assert w is not None
        scales.append(w.tolist())
        return own(z, t, c, r, w)

    prior.denoiser.forward = record_guidance  # type: ignore[method-assign]
    options = DiffusionOptions(num_inference_steps=1, guidance_scale=3.0)
    prior.sample(SPEC, torch.tensor([0, -1]), options, [seeded(0), seeded(1)])
    prior.sample(SPEC, torch.tensor([-1, -1]), options, [seeded(0), seeded(1)])
    assert scales == [[3.0, 1.0], [1.0, 1.0]]


def test_spans_end_at_the_earlier_time_and_a_share_of_them_has_length_0() -> None:
    times = torch.rand(40, generator=seeded(0))
    other_times = TimesConfig().sample_times(torch.rand(40, generator=seeded(1)))
    later, earlier = MeanFlow(instant_share=0.25).make_spans(times, other_times)
    assert torch.equal(later[:10], times[:10])
    assert torch.equal(later[:10], earlier[:10])
    assert (earlier[10:] < later[10:]).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"denoiser": "unet", "channel_multipliers": (1, 2)},
            "'model.mean_flow' for the model unet; expected it only with dit",
        ),
        ({"prediction": "v_prediction"}, "expected flow and flow"),
        ({"max_guidance": 0.5}, "max_guidance is 0.5"),
        ({"degradation": "noise"}, "expected one of them"),
    ],
)
def test_options_that_do_not_fit_a_mean_flow_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DiffusionPriorConfig(**SMALL | fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 5.0}, "learned guidance from 1 to 4"),
        ({"guidance_scale": 0.5}, "learned guidance from 1 to 4"),
        ({"guidance_rescale": 0.5}, "guidance_rescale is 0.5"),
    ],
)
def test_guidance_that_a_mean_flow_has_not_learned_is_refused(options: dict[str, Any], message: str) -> None:
    prior = make_prior()
    with pytest.raises(UserError, match=message):
        prior.sample(SPEC, torch.tensor([0]), DiffusionOptions(**options), [seeded(0)])
