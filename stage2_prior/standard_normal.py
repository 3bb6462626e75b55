"""z ~ N(0, I): the prior of a variational autoencoder. It has no parameters. Kingma, Welling 2013, arXiv 1312.6114."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from stage1_tokenizer.latent_spec import LatentSpec
from stage2_prior.prior import KnownCodes, Prior, randn_per_image
from training_harness.errors import UserError
from training_harness.pretrained import StrictConfig, WeightlessModel, strict_config


@dataclass(frozen=True, kw_only=True)
class StandardNormalOptions:
    temperature: float = 1.0
    """Standard deviation of the latents; below 1, samples are nearer to the mean and less diverse."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:  # NaN fails too
            raise UserError(
                f"temperature is {self.temperature}; expected a positive number. Pass 1 to sample from N(0, I)."
            )


@strict_config
class StandardNormalPriorConfig(StrictConfig):
    model_type: ClassVar[str] = "latentloom-standard-normal"

    channels: int = 16
    height: int = 1
    width: int = 1
    num_classes: int = 0
    tokenizer_id: str = ""


class StandardNormalPrior(Prior, WeightlessModel):
    config_class = StandardNormalPriorConfig
    config: StandardNormalPriorConfig
    options_class = StandardNormalOptions
    spec_fields = ("channels", "height", "width", "tokenizer_id")
    output_kind = "latents"

    @classmethod
    def for_spec(cls, spec: LatentSpec) -> Self:
        """Create the prior for the latents of a tokenizer."""
        return cls(StandardNormalPriorConfig(**{name: getattr(spec, name) for name in cls.spec_fields}))

    def sample(
        self,
        spec: LatentSpec,
        conditioning: Tensor,
        options: StandardNormalOptions,
        generators: Sequence[torch.Generator],
        on_step: Callable[[int, Tensor], None] | None = None,
        known: KnownCodes | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        self.check_spec(spec)
        if known is not None:
            raise UserError(
                "a standard normal prior generates whole images; expected a prior that supports known regions, such as an "
                "autoregressive prior. Leave out `image` and `mask_image`."
            )
        shape = (spec.channels, spec.height, spec.width)
        noise = randn_per_image(shape, generators) if noise is None else noise
        latents = options.temperature * noise.to(conditioning.device, self.dtype)
        if on_step is not None:
            on_step(0, latents)
        return latents

    def num_steps(self, spec: LatentSpec, options: StandardNormalOptions) -> int:
        return 1

    def describe(self, spec: LatentSpec) -> str:
        return f"{spec.height}×{spec.width} latents of {spec.channels} channels are sampled from a standard normal distribution"
