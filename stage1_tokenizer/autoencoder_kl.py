r"""A continuous bottleneck: latents are drawn from a Gaussian that the encoder gives, held near N(0, I).

    (μ, log σ²) = E(x),   z = μ + σ ε,   ε ~ N(0, I),   x̂ = G(z)
    KL(N(μ, σ²) ‖ N(0, I)) = ½ Σ (μ² + σ² − 1 − log σ²)

Kingma, Welling 2013, arXiv 1312.6114, appendix B. Weighed with about 10⁻⁶ it is the tokenizer of latent diffusion (Rombach et
al. 2021, arXiv 2112.10752, section 3.1); weighed as likelihood asks, a VAE, from whose prior N(0, I) images can be drawn.
The loss term `kl` is in nats by value of the image, so that its weight does not depend on the size. With a Gaussian
likelihood of standard deviation s, −log p(x) has (x − x̂)² / 2s²: beside a mean squared error of weight 1 that is 2s².
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stage1_tokenizer.autoencoder import Autoencoder, AutoencoderConfig, AutoencoderModel
from stage1_tokenizer.tokenizer import TokenizerOutput
from training_harness.precision import upcast
from training_harness.pretrained import strict_config


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLModel(AutoencoderModel):
    name: Literal["kl"] = "kl"
    prior: Literal["none", "standard_normal"] = "none"
    """`standard_normal`: latents come from N(0, I), and the run leaves a pipeline that samples without a stage two."""

    @property
    def samples_alone(self) -> bool:
        return self.prior == "standard_normal"


@strict_config
class AutoencoderKLConfig(AutoencoderConfig):
    model_type: ClassVar[str] = "latentloom-kl"
    model_options: ClassVar[Any] = AutoencoderKLModel

    model: AutoencoderKLModel = field(default_factory=AutoencoderKLModel)


class AutoencoderKL(Autoencoder):
    config_class = AutoencoderKLConfig
    config: AutoencoderKLConfig

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__(config)
        self.encoder, self.decoder = config.encoder(2 * config.model.latent_channels), config.decoder()
        self.post_init()

    def forward(self, pixel_values: Tensor) -> TokenizerOutput:
        mean, log_variance = self._posterior(pixel_values)
        latents = (
            mean + (0.5 * log_variance).exp() * torch.randn_like(mean) if self.training else mean
        )  # seeded by step
        divergence = gaussian_divergence(mean, log_variance).sum() / pixel_values.numel()
        return TokenizerOutput(self._decode(latents.to(pixel_values.dtype)), None, {"kl": divergence})

    def encode_latents(self, pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, log_variance = self._posterior(pixel_values)
        if generator is not None:  # drawn where the generator lives, so that it gives the same on every device
            noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
            mean = mean + (0.5 * log_variance).exp() * noise
        return self._normalized(mean).to(pixel_values.dtype)

    def latent_moments(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self._posterior(pixel_values)
        return mean, mean.square() + log_variance.exp()

    def _posterior(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, float32 (B, c, h, w)."""
        mean, log_variance = upcast(self._encode(pixel_values)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)  # e^20 and e^−30 are still finite in float32


def gaussian_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, 1)) in nats, elementwise."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
