"""The networks of the diffusion prior, compared with diffusers, and sampling with the prior."""

from typing import Any, get_args

import pytest
import torch
from tiny_models import DIFFUSERS_REASON, LABEL_NAMES, seeded, tiny_diffusion, tiny_tokenizer
from torch import Tensor
from torch.testing import assert_close

from pipelines.latent_generation import LatentGenerationPipeline, image_generators
from stage1_tokenizer.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from stage2_prior.diffusion.config import DiffusionPriorConfig, DiTModel
from stage2_prior.diffusion.dit import DiT, DiTBlock
from stage2_prior.diffusion.model import DiffusionPrior
from stage2_prior.diffusion.process import Prediction
from stage2_prior.diffusion.sampling import DiffusionOptions, SamplerName
from training_harness.errors import ConfigError, UserError

MODERN: dict[str, Any] = {"norm": "rms", "feed_forward": "swiglu", "qk_norm": True, "positions": "2d"}
TRANSFORMERS: dict[str, dict[str, Any]] = {"as DiT": {}, "modern": MODERN, "patches of two": {"patch_size": 2}}
UNET: dict[str, Any] = {"denoiser": "unet", "channel_multipliers": (1, 2), "attention": (2,)}
VARIANTS = TRANSFORMERS | {"U-Net": UNET}


def make_batch(count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    latents = torch.randn(count, 4, 4, 4, generator=seeded(0))
    return latents, torch.linspace(0.1, 0.9, count), torch.arange(count) % len(LABEL_NAMES)


def test_a_block_equals_the_block_of_diffusers_with_the_same_weights() -> None:
    model = DiTModel(hidden_size=32, num_heads=2, intermediate_size=128, num_layers=1)
    their_attention = pytest.importorskip("diffusers.models.attention", reason=DIFFUSERS_REASON)
    ours = DiTBlock(model).eval()
    theirs = their_attention.BasicTransformerBlock(
        32,
        2,
        16,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=4,
        attention_bias=True,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    ).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(1)) * 0.2)
        names = dict(zip(("to_q", "to_k", "to_v"), range(3), strict=True))
        for name, i in names.items():
            layer = getattr(theirs.attn1, name)
            layer.weight.copy_(ours.attention.qkv.weight.chunk(3)[i])
            layer.bias.copy_(ours.attention.qkv.bias.chunk(3)[i])
        pairs = [
            (theirs.attn1.to_out[0], ours.attention.out),
            (theirs.ff.net[0].proj, ours.feed_forward[0]),
            (theirs.ff.net[2], ours.feed_forward[2]),
            (theirs.norm1.linear, ours.modulation),
        ]
        for their_layer, our_layer in pairs:
            their_layer.load_state_dict(our_layer.state_dict())
        x, times, labels = torch.randn(2, 9, 32, generator=seeded(2)), torch.tensor([3, 700]), torch.tensor([0, 2])
        condition = torch.nn.functional.silu(theirs.norm1.emb(times, labels, hidden_dtype=torch.float32))
        assert_close(ours(x, condition, None), theirs(x, timestep=times, class_labels=labels), rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", TRANSFORMERS)
def test_every_block_starts_as_the_identity_and_the_network_predicts_0(variant: str) -> None:
    prior = tiny_diffusion(randomize_zeros=False, **VARIANTS[variant])
    latents, times, labels = make_batch()
    x, condition = torch.randn(3, 16, 32, generator=seeded(1)), torch.randn(3, 32, generator=seeded(2))
    assert torch.equal(prior.denoiser.blocks[0](x, condition, None), x)
    assert not prior.denoiser(latents, times, labels).any()


def test_a_unet_starts_by_predicting_0_and_every_output_depends_on_every_input() -> None:
    latents, times, labels = make_batch()
    assert not tiny_diffusion(randomize_zeros=False, **UNET).denoiser(latents, times, labels).any()
    denoiser = tiny_diffusion(**UNET).denoiser
    altered = latents.clone()
    altered[:, :, 0, 0] += 1
    changed = (denoiser(altered, times, labels) - denoiser(latents, times, labels)).abs().amax(1)
    assert changed.min() > 1e-6


@pytest.mark.parametrize("size", [1, 2, 4])
def test_unpatchify_inverts_patchify(size: int) -> None:
    config = DiffusionPriorConfig(
        channels=3, height=4, width=8, patch_size=size, hidden_size=32, num_heads=2, num_layers=1
    )
    denoiser = DiT(config, config.model)
    latents = torch.randn(2, 3, 4, 8, generator=seeded(0))
    patches = denoiser.patchify(latents)
    assert patches.shape == (2, 32 // size**2, 3 * size**2)
    assert torch.equal(denoiser.unpatchify(patches), latents)
    assert torch.equal(patches[:, 1].view(2, 3, size, size), latents[:, :, :size, size : 2 * size])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_prediction_depends_on_time_class_and_position(variant: str) -> None:
    denoiser = tiny_diffusion(**VARIANTS[variant]).denoiser
    latents, times, labels = make_batch()
    actual = denoiser(latents, times, labels)
    for changed in (denoiser(latents, times + 0.05, labels), denoiser(latents, times, (labels + 1) % 3)):
        assert not torch.allclose(actual, changed, atol=1e-3)
    shifted = denoiser(latents.roll(2, -1), times, labels).roll(-2, -1)  # equal without positions
    assert not torch.allclose(actual, shifted, atol=1e-3)


def test_the_loss_is_the_squared_error_of_the_target() -> None:
    prior = tiny_diffusion(prediction="flow")
    latents, times, labels = make_batch()
    noise = torch.randn(latents.shape, generator=seeded(3))
    noise_times = times[:, None, None, None]
    predicted = prior.denoiser((1 - noise_times) * latents + noise_times * noise, times, labels)
    expected = (predicted - (noise - latents)).square().mean((1, 2, 3))
    actual = prior(latents, labels, times, noise)
    assert_close(actual.total, expected.mean())
    assert_close(prior(latents, labels, times, noise, torch.tensor([3.0, 0.0, 0.0])).total, expected[0])


def sample_latents(prior: DiffusionPrior, count: int, batch: int, **options: Any) -> Tensor:
    tokenizer = tiny_tokenizer()
    prior.config.tokenizer_id = tokenizer.config.tokenizer_id
    generators = image_generators(seeded(4), count)
    labels = torch.arange(count) % len(LABEL_NAMES)
    spec, sampling_options = tokenizer.latent_spec(), DiffusionOptions(**{"num_inference_steps": 5} | options)
    parts = [slice(i, i + batch) for i in range(0, count, batch)]
    return torch.cat([prior.sample(spec, labels[part], sampling_options, generators[part]) for part in parts])


@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_an_image_is_the_same_alone_and_in_a_batch(sampler: SamplerName) -> None:
    prior = tiny_diffusion()
    alone, together = (sample_latents(prior, 4, batch, sampler=sampler, guidance_scale=2.0) for batch in (1, 4))
    assert_close(alone, together, rtol=0, atol=1e-4)
    assert not torch.allclose(alone[0], alone[3], atol=0.1)  # both of one class, with different noise


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_guidance_of_one_is_the_conditional_model(schedule: str) -> None:
    prior = tiny_diffusion(schedule=schedule, prediction="v_prediction")
    latents, _, labels = make_batch()
    conditional = prior.denoiser(latents, torch.full((3,), 0.4), labels)
    assert_close(prior.predict(latents, 0.4, labels, DiffusionOptions()), conditional)
    unconditional = prior.denoiser(latents, torch.full((3,), 0.4), torch.full((3,), -1))
    actual = prior.predict(latents, 0.4, labels, DiffusionOptions(guidance_scale=3.0))
    assert_close(actual, unconditional + 3 * (conditional - unconditional), rtol=0, atol=1e-5)
    outside_interval = DiffusionOptions(guidance_scale=3.0, guidance_interval=(0.5, 1.0))
    assert_close(prior.predict(latents, 0.4, labels, outside_interval), conditional)


def test_rescaled_guidance_has_the_standard_deviation_of_the_conditional_model() -> None:
    prior = tiny_diffusion()
    latents, _, labels = make_batch()
    conditional = prior.predict(latents, 0.4, labels, DiffusionOptions())
    rescaled = prior.predict(latents, 0.4, labels, DiffusionOptions(guidance_scale=4.0, guidance_rescale=1.0))
    assert_close(rescaled.flatten(1).std(1), conditional.flatten(1).std(1))


def test_sampling_does_not_use_the_global_random_state() -> None:
    prior = tiny_diffusion()
    before = torch.get_rng_state()
    sample_latents(prior, 2, 2, sampler="ddpm")
    assert torch.equal(before, torch.get_rng_state())


def test_a_pipeline_samples_saves_and_loads_it(tmp_path: Any) -> None:
    tokenizer, prior = tiny_tokenizer(), tiny_diffusion()
    prior.config.tokenizer_id = tokenizer.config.tokenizer_id
    pipeline = LatentGenerationPipeline(
        tokenizer, prior, LABEL_NAMES, DiffusionOptions(num_inference_steps=3, sampler="heun")
    )
    pipeline.set_progress_bar_config(disable=True)
    batch_sizes = list[int]()
    (first,) = pipeline(
        ["dog", "cat"],
        generator=seeded(0),
        output_type="pt",
        return_dict=False,
        callback_on_step_end=lambda pipe, step, _, tensors: batch_sizes.append(len(pipe.decode(tensors["latents"]))),
    )
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = LatentGenerationPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    (second,) = loaded(["dog", "cat"], generator=seeded(0), output_type="pt", return_dict=False)
    assert torch.equal(first, second)
    assert batch_sizes == [2, 2, 2]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prediction": "epsilon", "schedule": "cosine", "zero_terminal_snr": True}, "prediction"),
        ({"prediction": "epsilon", "schedule": "flow"}, "prediction"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr"),
        ({"patch_size": 3}, "patch_size"),
        ({"hidden_size": 36}, "hidden_size"),
        ({"channel_multipliers": (1, 2)}, "channel_multipliers"),
        ({"denoiser": "unet"}, "channel_multipliers"),
        ({"denoiser": "unet", "channel_multipliers": (1, 1, 1, 1)}, "channel_multipliers"),
        ({"denoiser": "unet", "channel_multipliers": (1, 2), "attention": (4,)}, "attention"),
    ],
)
def test_contradictory_options_are_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{field}\b.*; expected"):
        tiny_diffusion(**fields)


@pytest.mark.parametrize(
    "options",
    [
        {"num_inference_steps": 0},
        {"guidance_interval": (0.5, 1.5)},
        {"guidance_interval": (0.8, 0.2)},
        {"guidance_rescale": 1.5},
        {"guidance_scale": float("nan")},
        {"eta": 0.5},
    ],
)
def test_invalid_sampling_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"expected"):
        DiffusionOptions(**options)


def test_guidance_runs_no_second_half_when_there_are_no_classes() -> None:
    prior, tokenizer, rows = tiny_diffusion(), tiny_tokenizer(), list[int]()
    prior.config.tokenizer_id = tokenizer.config.tokenizer_id
    forward = prior.denoiser.forward
    prior.denoiser.forward = lambda z, *rest: (rows.append(len(z)), forward(z, *rest))[1]  # type: ignore[method-assign]
    options = DiffusionOptions(num_inference_steps=1, guidance_scale=3.0)
    for labels in ([-1, -1], [3, -1], [0, -1]):
        prior.sample(tokenizer.latent_spec(), torch.tensor(labels), options, image_generators(seeded(0), 2))
    assert rows == [2, 2, 4]


def test_more_steps_than_levels_are_refused_and_a_flow_has_no_levels() -> None:
    options = DiffusionOptions(num_inference_steps=1001)
    with pytest.raises(
        UserError, match="num_inference_steps is 1001 and the schedule cosine has 1000 levels; expected at"
    ):
        tiny_diffusion(schedule="cosine", prediction="v_prediction").config.check_sampling(options)
    tiny_diffusion().config.check_sampling(options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pipeline_with_continuous_latents_samples_in_half_precision(dtype: torch.dtype) -> None:
    shape = {"image_size": (16, 16), "channels": (8, 8), "blocks": (0, 1), "latent_channels": 4, "image_channels": 1}
    tokenizer = AutoencoderKL(AutoencoderKLConfig(**shape, latent_mean=[0.0] * 4, latent_std=[1.0] * 4))
    tokenizer.config.tokenizer_id = tokenizer.compute_id()
    spec = tokenizer.latent_spec()
    prior = tiny_diffusion(height=spec.height, width=spec.width, tokenizer_id=spec.tokenizer_id)
    pipeline = LatentGenerationPipeline(tokenizer, prior, LABEL_NAMES).to(dtype=dtype)
    assert pipeline("cat", 2, generator=seeded(0), num_inference_steps=2, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize("kind", get_args(Prediction))
def test_every_prediction_samples_finite_latents_from_pure_noise(kind: Prediction) -> None:
    fields = {"schedule": "linear"} if kind == "epsilon" else {"schedule": "cosine", "zero_terminal_snr": True}
    for sampler in get_args(SamplerName):
        assert sample_latents(tiny_diffusion(prediction=kind, **fields), 2, 2, sampler=sampler).isfinite().all()
