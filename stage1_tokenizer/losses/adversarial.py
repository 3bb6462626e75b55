r"""Adversarial losses: the discriminator's loss, the generator's loss, and the weight that balances them.

    hinge            D: ½ E max(0, 1 − D(x)) + ½ E max(0, 1 + D(x̂))       G: −E D(x̂)
    non-saturating   D: −½ E log σ(D(x)) − ½ E log(1 − σ(D(x̂)))           G: −E log σ(D(x̂))
    vanilla          D: the same                                          G: E log(1 − σ(D(x̂)))

    L = L_rec + r(s) λ w_a G,    λ = ‖∇ L_rec‖ / (‖∇ G‖ + δ) at the decoder's last layer,    r(s) from 0 to 1
    D + w_l (E (D(x) − α_fake)² + E (D(x̂) − α_real)²) + ½ γ E ‖∇_x D(x)‖²        LeCAM with averages α of the logits, and R1

Hinge: Lim, Ye 2017, arXiv 1705.02894. The other two: Goodfellow et al. 2014, arXiv 1406.2661, eq. 1 and section 3. λ: Esser et
al. 2021, arXiv 2012.09841, eq. 7. LeCAM: Tseng et al. 2021, arXiv 2104.03310, eq. 4. R1: Mescheder et al. 2018, arXiv
1801.04406, eq. 9.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.quantizers.protocol import all_reduce_mean
from training_harness.errors import ConfigError
from training_harness.optimization import resolve_steps
from training_harness.precision import upcast

LECAM_DECAY = 0.99
MINIMUM_VALUES = {"weight": 0, "learning_rate": 0, "channels": 1, "layers": 1, "lecam": 0, "r1": 0}


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    weight: float = 0.0
    """w_a, weight of the adversarial loss; 0 trains without a discriminator."""
    loss: Literal["hinge", "non_saturating", "vanilla"] = "hinge"
    """GAN loss of the discriminator and the generator."""
    adaptive: bool = True
    """Balance the gradients of both losses at the decoder's last layer with λ. Otherwise λ is 1."""
    start: int | float = 0.25
    """Start of the discriminator's training: an int is a step, a float is a share of the run in [0, 1]."""
    warmup: int | float = 0.05
    """Training of the discriminator before the generator's loss begins: an int in steps, a float as a share of the run."""
    ramp: int | float = 0.1
    """Time until the generator's loss has its full weight: an int in steps, a float as a share of the run."""
    learning_rate: float = 2e-4
    """Learning rate of the discriminator."""
    channels: int = 64
    """Number of channels of the discriminator's first layer."""
    layers: int = 3
    """Number of times that the discriminator halves the resolution, before its last two convolutions."""
    lecam: float = 0.0
    """w_l, weight of LeCAM regularization, which helps with few images; Open-MAGVIT2 uses 0.05."""
    r1: float = 0.0
    """γ of the R1 gradient penalty on real images, which needs a second backward pass; 0 disables it."""

    def __post_init__(self) -> None:
        for name in ("start", "warmup", "ramp"):
            value = getattr(self, name)
            if value < 0 or (isinstance(value, float) and value > 1):
                raise ConfigError(
                    f"adversarial.{name} is {value}; expected a share of the run in [0, 1], or a number of steps as an int. "
                    "For step 20000 of 80000 write 20000 or 0.25"
                )
        for name, minimum in MINIMUM_VALUES.items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"adversarial.{name} is {getattr(self, name)}; expected {minimum} or more")

    def trains_discriminator(self, step: int, max_steps: int) -> bool:
        """Whether the discriminator is trained at `step`, in [1, max_steps]."""
        return self.weight > 0 and step > resolve_steps(self.start, max_steps)

    def ramp_factor(self, step: int, max_steps: int) -> float:
        """Compute r(s), the factor in [0, 1] of the generator's loss at `step`."""
        if self.weight == 0:
            return 0.0
        first_step = resolve_steps(self.start, max_steps) + resolve_steps(self.warmup, max_steps)
        return min(1.0, max(0.0, (step - first_step) / max(1, resolve_steps(self.ramp, max_steps))))


def prepare_for_compile(discriminator: nn.Module, config: AdversarialConfig) -> None:
    """Make adversarial training work with compiled networks; call it before they are compiled.

    λ needs two backward passes through the decoder, so buffers must not be donated. R1 needs second derivatives, which
    compiled networks do not support, so the discriminator stays uncompiled with R1.
    """
    torch._functorch.config.donated_buffer = False
    if config.r1 > 0:
        discriminator.forward = torch.compiler.disable(discriminator.forward)


def generator_loss(kind: str, fake_logits: Tensor) -> Tensor:
    """Compute the generator's loss G of the module's header."""
    logits = upcast(fake_logits)
    if kind == "hinge":
        return -logits.mean()
    return F.softplus(-logits).mean() if kind == "non_saturating" else -F.softplus(logits).mean()


def discriminator_loss(kind: str, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Compute the discriminator's loss D of the module's header, without regularization."""
    real, fake = upcast(real_logits), upcast(fake_logits)
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def r1_penalty(real_logits: Tensor, images: Tensor) -> Tensor:
    """Compute ½ E ‖∇_x D(x)‖² of the real images; the logits of each image are summed.

    Args:
        real_logits: logits of the first images of the batch.
        images: the whole batch (B, C, H, W), with gradients enabled.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), images, create_graph=True)
    return 0.5 * upcast(gradient[: len(real_logits)]).square().flatten(1).sum(1).mean()


class LeCAM:
    """LeCAM regularization, with moving averages of the real and the fake logits over all processes."""

    def __init__(self) -> None:
        self.real = self.fake = 0.0

    def penalty(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Update the moving averages, and penalize the distance of logits to the average of the other class."""
        real, fake = upcast(real_logits), upcast(fake_logits)
        means = all_reduce_mean(torch.stack([real.detach().mean(), fake.detach().mean()])).tolist()
        if all(map(math.isfinite, means)):  # a bad batch would spoil the averages for good
            self.real += (1 - LECAM_DECAY) * (means[0] - self.real)
            self.fake += (1 - LECAM_DECAY) * (means[1] - self.fake)
        return (real - self.fake).square().mean() + (fake - self.real).square().mean()

    def state_dict(self) -> dict[str, Any]:
        return {"real": self.real, "fake": self.fake}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.real, self.fake = state["real"], state["fake"]


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Compute λ of Esser et al. 2021, eq. 7, averaged over processes.

    Returns:  a detached scalar in [0, 10⁴].
    """
    (reconstruction_gradient,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (adversarial_gradient,) = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)
    weight = upcast(reconstruction_gradient).norm() / (upcast(adversarial_gradient).norm() + 1e-4)
    return all_reduce_mean(weight.clamp(0, 1e4).detach())
