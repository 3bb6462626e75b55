r"""The diffusion prior: a denoising network, and sampling from noise to latents.

    L = E ‖prediction(x_t, t, y) − target(x, ε, t)‖²,     x_t = α_t x + σ_t ε           (`process`, `schedule`)

Ho, Jain, Abbeel 2020, arXiv 2006.11239. Latents have zero mean and unit variance per channel, so there is no scale factor.

At known positions, the known latents replace x̂ in every step. A variation of an image starts from the image with the noise level
`strength` (Meng et al. 2021, arXiv 2108.01073).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stage1_tokenizer.latent_spec import LatentSpec
from stage2_prior.conditioning.classes import apply_guidance, has_class
from stage2_prior.diffusion.config import DiffusionPriorConfig, UNetModel
from stage2_prior.diffusion.dit import DiT
from stage2_prior.diffusion.mean_flow import mean_flow_errors
from stage2_prior.diffusion.process import Estimate, NoiseLevel, add_noise, compute_estimate, compute_prediction
from stage2_prior.diffusion.samplers.diffusers_scheduler import sample_with_scheduler
from stage2_prior.diffusion.sampling import DiffusionOptions, rescale_guidance
from stage2_prior.diffusion.schedule import NoiseSchedule
from stage2_prior.diffusion.unet import UNet
from stage2_prior.prior import KnownCodes, Prior, PriorLoss, randn_per_image
from training_harness.errors import UserError
from training_harness.pretrained import count_parameters

STRAIGHT_STEP_SAMPLERS = ("euler", "adams-bashforth")  # their steps are straight lines, as in a mean flow
LOSS_WEIGHT_EPS = 0.01  # c in the example weights of a mean flow


class DiffusionPrior(Prior):
    config_class = DiffusionPriorConfig
    config: DiffusionPriorConfig
    options_class = DiffusionOptions
    spec_fields = ("channels", "height", "width", "tokenizer_id")
    output_kind = "latents"
    _no_split_modules = ["DiTBlock", "ConvolutionBlock"]  # noqa: RUF012 - name and type of transformers; the units of FSDP
    # These are not hidden matrices, so the optimizer treats them differently.
    end_layers = ("denoiser.patch", "denoiser.stem", "denoiser.final")

    def __init__(self, config: DiffusionPriorConfig) -> None:
        super().__init__(config)
        model = config.model
        self.denoiser = UNet(config, model) if isinstance(model, UNetModel) else DiT(config, model)
        self.schedule = NoiseSchedule(model.schedule, model.zero_terminal_snr)
        self.scheduler: Any = None
        """A scheduler of diffusers, which replaces the option `sampler`."""
        self.post_init()

    def forward(
        self,
        latents: Tensor,
        conditioning: Tensor,
        times: Tensor,
        noise: Tensor,
        weights: Tensor | None = None,
        degraded: Tensor | None = None,
        ends: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> PriorLoss:
        """Compute the loss of latents at noisy times.

        Args:
            latents: (B, c, h, w) normalized latents.
            conditioning: (B,) int64 class ids.
            times: (B,) in (0, 1].
            noise: (B, c, h, w) ~ N(0, I).
            weights: (B,) weight of the squared error of each image; default: 1.
            degraded: (B, c, h, w) latents of the degraded images, for restoration.
            ends: (B,) end of the span of each image in [0, t], for a mean flow.
            guidance: (B,) guidance scale of each image, for a mean flow.
        """
        errors = self.squared_errors(latents, conditioning, times, noise, degraded, ends, guidance)
        loss = errors.mean()
        if ends is not None:
            balanced = 1 / (errors.detach() + LOSS_WEIGHT_EPS)
            weights = balanced if weights is None else weights * balanced
        return PriorLoss(loss if weights is None else (weights * errors).mean(), {"squared_error": loss})

    def squared_errors(
        self,
        latents: Tensor,
        conditioning: Tensor,
        times: Tensor,
        noise: Tensor,
        degraded: Tensor | None = None,
        ends: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Compute the mean squared error of the prediction for each image, (B,) float32; arguments as in `forward`."""
        level = self.schedule.levels(times)
        level = NoiseLevel(*(part[:, None, None, None] for part in level))
        noisy = add_noise(latents, noise, level).to(self.dtype)
        target = compute_prediction(latents, noise, level, self.config.model.prediction)
        if ends is None or guidance is None:
            errors = self.denoiser(concat_condition(noisy, degraded), times, conditioning).float() - target.float()
        else:
            errors = mean_flow_errors(
                self.denoiser, noisy, target, times, conditioning, self.null_class, ends, guidance
            )
        return errors.square().flatten(1).mean(1)

    @property
    def null_class(self) -> int:
        return self.denoiser.condition.class_embedding.null_class

    @torch.no_grad()
    def sample(
        self,
        spec: LatentSpec,
        conditioning: Tensor,
        options: DiffusionOptions,
        generators: Sequence[torch.Generator],
        on_step: Callable[[int, Tensor], None] | None = None,
        known: KnownCodes | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        self.check_spec(spec)
        self.config.check_sampling(options)
        if not has_class(conditioning, self.null_class).any():
            options = replace(options, guidance_scale=1.0)
        shape = (spec.channels, spec.height, spec.width)

        def sample_noise() -> Tensor:
            return randn_per_image(shape, generators).to(conditioning.device)

        degraded = None
        if self.is_restoration:
            if known is None:
                raise UserError(
                    f"the prior restores images (degradation {self.config.degradation}) and no image was passed; expected one. "
                    "Pass `image=` or `--image`."
                )
            degraded, known = known.codes.to(self.dtype), None

        def denoise(noisy: Tensor, level: NoiseLevel[float]) -> Estimate:
            end = ends.get(level.time)
            prediction = self.predict(noisy, level.time, conditioning, options, end, degraded)
            estimate = compute_estimate(noisy, prediction, level, self.config.model.prediction)
            if known is None:
                return estimate
            sample = torch.where(known.known_mask[:, None], known.codes, estimate.sample)
            return compute_estimate(noisy, sample, level, "sample")

        steps = options.num_inference_steps
        times = self.schedule.sampling_times(steps, options.timestep_spacing)
        levels = [self.schedule.level(time) for time in times.tolist()]
        ends = dict[float, float]()
        if self.config.model.mean_flow and options.sampler in STRAIGHT_STEP_SAMPLERS and self.scheduler is None:
            ends = dict(pairwise(times.tolist()))  # a step follows the mean velocity to its end
        latents, begin = sample_noise() if noise is None else noise.to(conditioning.device), 0
        if known is not None and known.strength < 1:
            if self.scheduler is not None:
                raise UserError(
                    f"strength is {known.strength} and the scheduler is one of diffusers, which starts from pure noise; expected a "
                    "sampler of latentloom. Set prior.scheduler to None, or pass strength=1."
                )
            begin = steps - max(1, round(known.strength * steps))
            latents = add_noise(known.codes, latents, levels[begin])
        if self.scheduler is None:
            states = options.make_sampler()(denoise, latents, levels[begin:], sample_noise)
        else:
            states = sample_with_scheduler(self.scheduler, self.schedule, denoise, latents, steps, generators)
        for step, state in enumerate(states, begin):
            latents = state
            if on_step is not None:
                on_step(step, latents)
        return latents

    def predict(
        self,
        noisy: Tensor,
        time: float,
        conditioning: Tensor,
        options: DiffusionOptions,
        end: float | None = None,
        degraded: Tensor | None = None,
    ) -> Tensor:
        """Predict (B, c, h, w) in float32 at one time, with guidance.

        Guidance runs both halves in one batch of 2 B. A mean flow takes the guidance scale as an input and predicts the mean
        velocity down to `end`, by default the velocity at `time`. It uses guidance when the middle of the span is in the interval.
        """
        noisy = concat_condition(noisy.to(self.dtype), degraded)
        times = noisy.new_full((len(noisy),), time, dtype=torch.float32)
        if self.config.model.mean_flow:
            end = time if end is None else end
            guidance = options.guidance_scale if options.uses_guidance_at((time + end) / 2) else 1.0
            ends = torch.full_like(times, end)
            scales = torch.where(has_class(conditioning, self.null_class), guidance, torch.ones_like(times))
            return self.denoiser(noisy, times, conditioning, ends, scales).float()
        if not options.uses_guidance_at(time):
            return self.denoiser(noisy, times, conditioning).float()
        null = torch.full_like(conditioning, self.null_class)
        both = self.denoiser(torch.cat([noisy, noisy]), times.repeat(2), torch.cat([conditioning, null])).float()
        conditional, unconditional = both.chunk(2)
        guided = apply_guidance(conditional, unconditional, options.guidance_scale)
        return rescale_guidance(guided, conditional, options.guidance_rescale)

    @property
    def is_restoration(self) -> bool:
        return self.config.degradation != "none"

    def num_steps(self, spec: LatentSpec, options: DiffusionOptions) -> int:
        if self.scheduler is None:
            return options.num_inference_steps
        self.scheduler.set_timesteps(options.num_inference_steps)
        return len(self.scheduler.timesteps)  # some schedulers count evaluations as steps

    def describe(self, spec: LatentSpec) -> str:
        action = f"restores images (degradation {self.config.degradation}) as" if self.is_restoration else "samples"
        return (
            f"a diffusion prior ({count_parameters(self):,} parameters) {action} {spec.height}×{spec.width} latents of "
            f"{spec.channels} channels"
        )


def concat_condition(noisy: Tensor, degraded: Tensor | None) -> Tensor:
    """Concatenate noisy latents (B, c, h, w) with the latents of degraded images to (B, 2c, h, w), where there are any."""
    return noisy if degraded is None else torch.cat([noisy, degraded.to(noisy)], dim=1)
