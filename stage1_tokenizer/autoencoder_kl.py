r"""An autoencoder with continuous latents. The encoder predicts a Gaussian, and a KL term keeps it close to N(0, I).

    (μ, log σ²) = E(x),   z = μ + σ ε,   ε ~ N(0, I),   x̂ = G(z)
    KL(N(μ, σ²) ‖ N(0, I)) = ½ Σ (μ² + σ² − 1 − log σ²)

Kingma, Welling 2013, arXiv 1312.6114, appendix B. With a KL weight of about 10⁻⁶ the model is the tokenizer of latent
diffusion (Rombach et al. 2021, arXiv 2112.10752, section 3.1). With the weight of the likelihood it is a VAE, and latents
sampled from N(0, I) decode to images. The loss term `kl` is in nats per value of the image, so its weight does not depend on
the image size. A Gaussian likelihood of standard deviation s has (x − x̂)² / 2s² in −log p(x). The KL weight that matches a
mean squared error of weight 1 is therefore 2s².
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
    """`standard_normal` samples latents from N(0, I), and the run also saves a pipeline that needs no stage two."""

    @property
    def samples_without_prior(self) -> bool:
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
        self.encoder, self.decoder = config.build_encoder(2 * config.model.latent_channels), config.build_decoder()
        self.post_init()

    def forward(self, pixel_values: Tensor) -> TokenizerOutput:
        mean, log_variance = self._posterior(pixel_values)
        latents = mean
        if self.training:
            latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)  # the run seeds the global generator
        divergence = gaussian_divergence(mean, log_variance).sum() / pixel_values.numel()
        return TokenizerOutput(self._decode(latents.to(pixel_values.dtype)), None, {"kl": divergence})

    def encode_latents(self, pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, log_variance = self._posterior(pixel_values)
        if generator is not None:  # on the generator's device, so that the noise is the same for every model device
            noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
            mean = mean + (0.5 * log_variance).exp() * noise
        return self._normalize(mean).to(pixel_values.dtype)

    def latent_moments(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self._posterior(pixel_values)
        return mean, mean.square() + log_variance.exp()

    def _posterior(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of the latents, both float32 (B, c, h, w)."""
        mean, log_variance = upcast(self._encode(pixel_values)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)  # e^20 and e^−30 are still finite in float32


def gaussian_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Compute KL(N(μ, σ²) ‖ N(0, 1)) in nats for each element."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
