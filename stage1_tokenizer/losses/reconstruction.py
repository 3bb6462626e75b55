r"""The loss of a tokenizer without a discriminator, and the weights of its terms.

    L_rec = w₁ ‖x − x̂‖₁ + w₂ ‖x − x̂‖² + w_c √((x − x̂)² + ε²) + w_p perceptual
    L = L_rec + w_b ‖sg[z] − e‖² + β ‖z − sg[e]‖² + w_e entropy + w_kl KL

A bottleneck provides some of the terms of the second line. All means are over elements, in float32. The third term of L_rec is
the Charbonnier loss: absolute for errors well above ε and squared below (Charbonnier et al. 1994,
doi 10.1109/ICIP.1994.413553).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training_harness.errors import ConfigError
from training_harness.precision import upcast

CHARBONNIER_EPSILON = 1e-3  # for pixels in [-1, 1]; an eighth of an 8-bit level
PerceptualLoss = Callable[[Tensor, Tensor], Tensor]
"""Takes (reconstruction, original), both (B, C, H, W) in [-1, 1], and returns a scalar."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    l1: float = 1.0
    """Weight of the mean absolute error."""
    l2: float = 1.0
    """Weight of the mean squared error."""
    charbonnier: float = 0.0
    """Weight of the Charbonnier loss, an absolute error that is smooth at 0; 0 disables it."""
    perceptual: float = 1.0
    """Weight of the perceptual loss, if the run uses one."""
    commitment: float = 0.25
    """β of van den Oord et al. 2017, weight of the commitment loss, which moves latents to their codes."""
    codebook: float = 1.0
    """Weight of the codebook loss, which moves codes to their latents; `vq`, `simvq` and `ibq` have one."""
    entropy: float = 0.1
    """Weight of the entropy loss of `lfq`, `bsq` and `ibq`."""
    kl: float = 1e-6
    """Weight of the KL divergence of `kl` in nats per value of the image."""

    def __post_init__(self) -> None:
        for name in ("l1", "l2", "charbonnier", "perceptual", "commitment", "codebook", "entropy", "kl"):
            if getattr(self, name) < 0:
                raise ConfigError(f"reconstruction.{name} is {getattr(self, name)}; expected a weight of 0 or more")
        if self.l1 + self.l2 + self.charbonnier == 0:
            raise ConfigError(
                "reconstruction.l1, l2 and charbonnier are all 0; expected at least one positive weight. Pass "
                "--reconstruction.l1 1.0"
            )


def reconstruction_terms(
    reconstruction: Tensor, pixel_values: Tensor, weights: ReconstructionConfig, perceptual: PerceptualLoss | None
) -> dict[str, Tensor]:
    """Compute the unweighted reconstruction terms, float32 scalars by the field names of `ReconstructionConfig`.

    Args:     reconstruction, pixel_values (B, C, H, W) in [-1, 1].
    Returns:  `l1` and `l2` always, because they are logged; `charbonnier` and `perceptual` when they are in use.
    """
    reconstruction, pixel_values = upcast(reconstruction), upcast(pixel_values)
    terms = {"l1": F.l1_loss(reconstruction, pixel_values), "l2": F.mse_loss(reconstruction, pixel_values)}
    if weights.charbonnier > 0:
        terms["charbonnier"] = ((reconstruction - pixel_values).square() + CHARBONNIER_EPSILON**2).sqrt().mean()
    if perceptual is not None:
        terms["perceptual"] = upcast(perceptual(reconstruction, pixel_values))
    return terms


def sum_weighted(terms: Mapping[str, Tensor], weights: ReconstructionConfig) -> Tensor:
    """Sum the terms, each weighted by the field of `weights` with the term's name."""
    return torch.stack([getattr(weights, name) * value for name, value in terms.items()]).sum()
