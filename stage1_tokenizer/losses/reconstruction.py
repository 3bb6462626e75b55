r"""What a tokenizer minimises without a discriminator, term by term.

    L_rec = w₁ ‖x − x̂‖₁ + w₂ ‖x − x̂‖² + w_c √((x − x̂)² + ε²) + w_p perceptual
    L = L_rec + ‖sg[z] − e‖² + β ‖z − sg[e]‖² + w_e entropy + w_kl KL        those of its bottleneck's terms that there are

All means are over elements, in float32. The third is Charbonnier's loss, absolute for errors well above ε and squared below
(Charbonnier et al. 1994, doi 10.1109/ICIP.1994.413553).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training_harness.errors import ConfigError
from training_harness.precision import upcast

CHARBONNIER_EPSILON = 1e-3  # of a range of 2: a quarter of a grey level
PerceptualLoss = Callable[[Tensor, Tensor], Tensor]
"""(reconstruction, original), both (B, C, H, W) in [-1, 1], to a scalar."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    l1: float = 1.0
    """Weight of the mean absolute error."""
    l2: float = 1.0
    """Weight of the mean squared error."""
    charbonnier: float = 0.0
    """Weight of Charbonnier's loss, an absolute error that is smooth at 0; 0 leaves it out."""
    perceptual: float = 1.0
    """Weight of the perceptual loss, where one is given."""
    commitment: float = 0.25
    """β of van den Oord et al. 2017: how strongly the encoder is held to its codes."""
    codebook: float = 1.0
    """Weight of what draws codes to latents, in codebooks learnt by gradient."""
    entropy: float = 0.1
    """Weight of the entropy term of `lfq`, `bsq` and `ibq`."""
    kl: float = 1e-6
    """Weight of the divergence of `kl`, in nats by value of the image."""

    def __post_init__(self) -> None:
        for name in ("l1", "l2", "charbonnier", "perceptual", "commitment", "codebook", "entropy", "kl"):
            if getattr(self, name) < 0:
                raise ConfigError(f"reconstruction.{name} is {getattr(self, name)}; expected a weight of 0 or more")
        if self.l1 + self.l2 + self.charbonnier == 0:
            raise ConfigError(
                "reconstruction.l1, l2 and charbonnier are all 0; expected at least one positive weight, such as l1 1.0"
            )


def reconstruction_terms(
    reconstruction: Tensor, pixel_values: Tensor, weights: ReconstructionConfig, perceptual: PerceptualLoss | None
) -> dict[str, Tensor]:
    """Unweighted float32 means by the names of `ReconstructionConfig`; l1 and l2 whatever their weights, for the log."""
    reconstruction, pixel_values = upcast(reconstruction), upcast(pixel_values)
    terms = {"l1": F.l1_loss(reconstruction, pixel_values), "l2": F.mse_loss(reconstruction, pixel_values)}
    if weights.charbonnier > 0:
        terms["charbonnier"] = ((reconstruction - pixel_values).square() + CHARBONNIER_EPSILON**2).sqrt().mean()
    if perceptual is not None:
        terms["perceptual"] = upcast(perceptual(reconstruction, pixel_values))
    return terms


def sum_weighted(terms: Mapping[str, Tensor], weights: ReconstructionConfig) -> Tensor:
    """Σ w_i L_i, each weight being the field of the term's name."""
    return torch.stack([getattr(weights, name) * value for name, value in terms.items()]).sum()
