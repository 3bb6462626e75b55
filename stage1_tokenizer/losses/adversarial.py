r"""The discriminator's side: what it minimises, what the decoder minimises against it, and how the two are balanced.

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
from training_harness.optimization import steps_of
from training_harness.precision import widened

LECAM_DECAY = 0.99
LEAST = {"weight": 0, "learning_rate": 0, "channels": 1, "layers": 1, "lecam": 0, "r1": 0}


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    weight: float = 0.0
    """w_a; 0 trains without a discriminator."""
    loss: Literal["hinge", "non_saturating", "vanilla"] = "hinge"
    """Adversarial loss."""
    adaptive: bool = True
    """Whether λ balances the gradients at the decoder's last layer; if not it is 1, and `weight` is fixed."""
    start: int | float = 0.25
    """When the discriminator begins to learn: an int is a step, a float a share of the run in [0, 1]."""
    warmup: int | float = 0.05
    """How long it learns before the generator hears of it: steps, or a share of the run."""
    ramp: int | float = 0.1
    """How long the generator's term takes to reach its full weight: steps, or a share of the run."""
    learning_rate: float = 2e-4
    """Learning rate of the discriminator."""
    channels: int = 64
    """Width of the discriminator's first layer."""
    layers: int = 3
    """Halvings of the resolution before its last two convolutions."""
    lecam: float = 0.0
    """Weight of LeCAM regularisation, for few images; Open-MAGVIT2 has 0.05."""
    r1: float = 0.0
    """γ of the gradient penalty on real images, which costs a second backward pass; 0 leaves it out."""

    def __post_init__(self) -> None:
        for name in ("start", "warmup", "ramp"):
            value = getattr(self, name)
            if value < 0 or (isinstance(value, float) and value > 1):
                raise ConfigError(
                    f"adversarial.{name} is {value}; expected a share of the run in [0, 1], or a step as an int. "
                    "For step 20000 of 80000 write 20000 or 0.25"
                )
        for name, least in LEAST.items():
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


def allow_compiling(discriminator: nn.Module, config: AdversarialConfig) -> None:
    """Before networks are compiled: λ goes back through the decoder twice, and R1 is differentiated again, which no compiled
    network can be."""
    torch._functorch.config.donated_buffer = False
    if config.r1 > 0:
        discriminator.forward = torch.compiler.disable(discriminator.forward)


def generator_loss(kind: str, fake_logits: Tensor) -> Tensor:
    """G of the module's header: what the decoder minimises."""
    logits = widened(fake_logits)
    if kind == "hinge":
        return -logits.mean()
    return F.softplus(-logits).mean() if kind == "non_saturating" else -F.softplus(logits).mean()


def discriminator_loss(kind: str, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """D of the module's header, without its regularisation."""
    real, fake = widened(real_logits), widened(fake_logits)
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def r1_penalty(real_logits: Tensor, images: Tensor) -> Tensor:
    """½ E ‖∇_x D(x)‖² of the logits of the first of `images`, which need gradients; each image's logits are summed."""
    (gradient,) = torch.autograd.grad(real_logits.sum(), images, create_graph=True)
    return 0.5 * widened(gradient[: len(real_logits)]).square().flatten(1).sum(1).mean()


class LeCAM:
    """Moving averages of both kinds of logits, over all processes; part of a checkpoint."""

    def __init__(self) -> None:
        self.real = self.fake = 0.0

    def penalty(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Draws real logits to where fake ones have been, and the other way round; counts these logits too."""
        real, fake = widened(real_logits), widened(fake_logits)
        means = all_reduce_mean(torch.stack([real.detach().mean(), fake.detach().mean()])).tolist()
        if all(map(math.isfinite, means)):  # or one bad batch would stay in the averages
            self.real += (1 - LECAM_DECAY) * (means[0] - self.real)
            self.fake += (1 - LECAM_DECAY) * (means[1] - self.fake)
        return (real - self.fake).square().mean() + (fake - self.real).square().mean()

    def state_dict(self) -> dict[str, Any]:
        return {"real": self.real, "fake": self.fake}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.real, self.fake = state["real"], state["fake"]


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """λ of Esser et al. 2021, eq. 7: detached, in [0, 10⁴], averaged over processes."""
    (of_reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (of_adversary,) = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)
    weight = widened(of_reconstruction).norm() / (widened(of_adversary).norm() + 1e-4)
    return all_reduce_mean(weight.clamp(0, 1e4).detach())
