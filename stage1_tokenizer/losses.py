r"""What stage one minimises, term by term.

    L = w₁ ‖x − x̂‖₁ + w₂ ‖x − x̂‖² + w_p perceptual + ‖sg[z] − e‖² + β ‖z − sg[e]‖² + r(s) λ w_a L_adv

All means are over elements, in float32. The adversarial terms are the hinge losses of Lim, Ye 2017, arXiv 1705.02894;
λ = ‖∇ L_rec‖ / (‖∇ L_adv‖ + δ) at the decoder's last layer is Esser et al. 2021, arXiv 2012.09841, eq. 7; r(s) ramps from
0 to 1 after the discriminator's term begins.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.quantizers.protocol import summed
from training_harness.errors import ConfigError
from training_harness.optimization import steps_of
from training_harness.precision import widened

PerceptualLoss = Callable[[Tensor, Tensor], Tensor]
"""(reconstruction, original), both (B, C, H, W) in [-1, 1], to a scalar."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    l1: float = 1.0
    """Weight of the mean absolute error."""
    l2: float = 1.0
    """Weight of the mean squared error."""
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
        for name in ("l1", "l2", "perceptual", "commitment", "codebook", "entropy", "kl"):
            if getattr(self, name) < 0:
                raise ConfigError(f"reconstruction.{name} is {getattr(self, name)}; expected a weight of 0 or more")
        if self.l1 + self.l2 == 0:
            raise ConfigError(
                "reconstruction.l1 and reconstruction.l2 are both 0; expected at least one positive weight"
            )


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    weight: float = 0.0
    """w_a; 0 trains without a discriminator."""
    adaptive: bool = True
    """Whether λ balances the gradients at the decoder's last layer; if not it is 1."""
    start: int | float = 0.25
    """When the discriminator begins to learn: an int is a step, a float a share of the run in [0, 1]."""
    warmup: int | float = 0.05
    """How long it learns before the generator hears of it: steps, or a share of the run."""
    ramp: int | float = 0.1
    """How long the generator's term takes to reach its full weight: steps, or a share of the run."""
    learning_rate: float = 2e-4
    channels: int = 64
    """Width of the discriminator's first layer."""
    layers: int = 3
    """Halvings of the resolution before its last two convolutions."""

    def __post_init__(self) -> None:
        for name in ("start", "warmup", "ramp"):
            value = getattr(self, name)
            if value < 0 or (isinstance(value, float) and value > 1):
                raise ConfigError(
                    f"adversarial.{name} is {value}; expected a share of the run in [0, 1], or a step as an int. "
                    "For step 20000 of 80000 write 20000 or 0.25"
                )
        for name, least in (("weight", 0), ("learning_rate", 0), ("channels", 1), ("layers", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"adversarial.{name} is {getattr(self, name)}; expected {least} or more")

    def discriminating(self, step: int, max_steps: int) -> bool:
        """Whether the discriminator learns at `step` of [1, max_steps]."""
        return self.weight > 0 and step > steps_of(self.start, max_steps)

    def share(self, step: int, max_steps: int) -> float:
        """r(s): share of the generator's adversarial term at `step`."""
        if self.weight == 0:
            return 0.0
        begin = steps_of(self.start, max_steps) + steps_of(self.warmup, max_steps)
        return min(1.0, max(0.0, (step - begin) / max(1, steps_of(self.ramp, max_steps))))


def reconstruction_terms(
    reconstruction: Tensor, pixel_values: Tensor, perceptual: PerceptualLoss | None
) -> dict[str, Tensor]:
    """Unweighted float32 means by the names of `ReconstructionConfig`."""
    reconstruction, pixel_values = widened(reconstruction), widened(pixel_values)
    terms = {"l1": F.l1_loss(reconstruction, pixel_values), "l2": F.mse_loss(reconstruction, pixel_values)}
    if perceptual is not None:
        terms["perceptual"] = widened(perceptual(reconstruction, pixel_values))
    return terms


def generator_hinge(fake_logits: Tensor) -> Tensor:
    """−mean D(x̂)."""
    return -widened(fake_logits).mean()


def discriminator_hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """½ mean max(0, 1 − D(x)) + ½ mean max(0, 1 + D(x̂))."""
    return 0.5 * (F.relu(1 - widened(real_logits)).mean() + F.relu(1 + widened(fake_logits)).mean())


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """λ of Esser et al. 2021, eq. 7: detached, in [0, 10⁴], averaged over processes."""
    (of_reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (of_adversary,) = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)
    weight = widened(of_reconstruction).norm() / (widened(of_adversary).norm() + 1e-4)
    processes = summed(torch.ones_like(weight))
    return summed(weight.clamp(0, 1e4).detach()) / processes
