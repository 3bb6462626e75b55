r"""Training times of a diffusion prior, and their loss weights.

uniform         t ~ U(0, 1]
logit-normal    t = 1 / (1 + exp(−(m + s z))),  z ~ N(0, 1): more in the middle      Esser et al. 2024, arXiv 2403.03206
min-SNR         the squared error of x̂ has the weight min(α² / σ², γ)               Hang et al. 2023, arXiv 2303.09556
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stage2_prior.diffusion.process import NoiseLevel, Prediction, sample_error_factor
from training_harness.errors import ConfigError

BELOW_ONE = 1 - 2**-24  # above it, the inverse error function is infinite in float32


@dataclass(frozen=True, kw_only=True)
class TimesConfig:
    distribution: Literal["uniform", "logit-normal"] = "uniform"
    """Distribution of the times."""
    logit_mean: float = 0.0
    """Mean of logit-normal times; above 0 they are noisier."""
    logit_std: float = 1.0
    """Standard deviation of the logits of logit-normal times."""
    min_snr_gamma: float = 0.0
    """Largest loss weight γ for times near the data, 5 in the paper; 0 gives all predictions the same weight."""

    def __post_init__(self) -> None:
        if self.logit_std <= 0:
            raise ConfigError(f"times.logit_std is {self.logit_std}; expected a positive number such as 1.0")
        if self.min_snr_gamma < 0:
            raise ConfigError(f"times.min_snr_gamma is {self.min_snr_gamma}; expected 0 or more, such as 5.0")

    def sample_times(self, uniform: Tensor) -> Tensor:
        """Convert uniform numbers (B,) in [0, 1) to times (B,) in (0, 1] with the distribution."""
        share = 1 - uniform
        if self.distribution == "uniform":
            return share
        normal = math.sqrt(2) * torch.erfinv((2 * share - 1).clamp(-BELOW_ONE, BELOW_ONE))
        return torch.sigmoid(self.logit_mean + self.logit_std * normal)

    def loss_weights(self, level: NoiseLevel[Tensor], kind: Prediction) -> Tensor | None:
        """Return the weights of the squared errors of predictions, or None when all are equal."""
        if self.min_snr_gamma == 0:
            return None
        ratio = (level.alpha / level.sigma).square()
        return ratio.clamp(max=self.min_snr_gamma) * sample_error_factor(level, kind).square()
