r"""Mean flow: the network tells the mean velocity from t down to r, so that one step crosses the whole span.

    u(z_t, r, t) = 1 / (t − r) ∫_r^t v(z_s, s) ds        z_r = z_t − (t − r) u(z_t, r, t),     u(z_t, t, t) = v(z_t, t)

Differentiated in t this is v = u + (t − r) du/dt, and the network learns to make that the velocity of its example:

    V = u_θ(z, r, t) + (t − r) sg[du/dt],     du/dt = ∂_z u · u_θ(z, t, t) + ∂_t u         forwards, in one pass
    L = E ‖V − ṽ‖²,     ṽ = ω (ε − x) + (1 − ω) sg[u_θ(z, t, t | no class)]

Each example counts 1 / (sg[its squared error] + c): guidance and derivative make some targets far noisier than others. ω, the
guidance scale, is drawn evenly and told to the network, so that guidance costs no second evaluation when sampling. Geng et al.
2025, arXiv 2505.13447; u_θ(z, t, t) for the direction in place of ε − x, and ω as an input: arXiv 2512.02012. A plain flow comes
first (`spans_from`), since the two terms of the loss pull against each other: Zhang et al. 2025, arXiv 2510.20771.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from stage2_prior.conditioning.classes import guided, has_class
from training_harness.errors import ConfigError
from training_harness.precision import upcast


@dataclass(frozen=True, kw_only=True)
class MeanFlow:
    max_guidance: float = 4.0
    """Up to which guidance scale it learns."""
    instant_share: float = 0.5
    """Share of the images that learn the velocity at one time and not between two."""
    spans_from: float = 0.0
    """Share of the run that comes first and learns a plain flow, at half the time a step."""

    def __post_init__(self) -> None:
        where = "model.mean_flow"
        if not self.max_guidance >= 1:
            raise ConfigError(
                f"{where}.max_guidance is {self.max_guidance}; expected 1, which is without guidance, or more"
            )
        if not 0 < self.instant_share <= 1:
            raise ConfigError(f"{where}.instant_share is {self.instant_share}; expected a share in (0, 1], such as 0.5")
        if not 0 <= self.spans_from < 1:
            raise ConfigError(f"{where}.spans_from is {self.spans_from}; expected a share in [0, 1), such as 0.5")

    def spans(self, times: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Two times of each image, (B,) each → the later and the earlier one.

        For the first images, `instant_share` of them, both are the first of the two.
        """
        instants = torch.arange(len(times), device=times.device) < round(self.instant_share * len(times))
        others = torch.where(instants, times, others)
        return torch.maximum(times, others), torch.minimum(times, others)


Network = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""û of z (B, c, h, w), t, class ids, r and ω, (B,) each."""


def mean_flow_errors(
    network: Network,
    noisy: Tensor,
    velocity: Tensor,
    times: Tensor,
    classes: Tensor,
    null_class: int,
    ends: Tensor,
    guidance: Tensor,
) -> Tensor:
    """V − ṽ, (B, c, h, w) in float32 or wider.

    Args:
        noisy, velocity: z_t and ε − x, (B, c, h, w).
        classes: (B,) ids; where there is none, or the null class, ω counts as 1.
        ends, guidance: r in [0, t] and ω of at least 1, (B,) each.
    """
    guidance = torch.where(has_class(classes, null_class), guidance, 1.0)
    predicted = upcast(network(noisy, times, classes, ends, guidance))
    with torch.no_grad():
        target = upcast(velocity).clone()
        if len(rows := (guidance > 1).nonzero()[:, 0]):
            null, at = torch.full_like(classes[rows], null_class), times[rows]
            without = upcast(network(noisy[rows], at, null, at, torch.ones_like(at)))
            target[rows] = guided(target[rows], without, guidance[rows].view(-1, 1, 1, 1))
        if len(rows := (ends < times).nonzero()[:, 0]):
            change = total_derivative(network, noisy[rows], times[rows], classes[rows], ends[rows], guidance[rows])
            target[rows] -= (times - ends)[rows].view(-1, 1, 1, 1) * upcast(change)
    return predicted - target


@torch.no_grad()
def total_derivative(
    network: Network, noisy: Tensor, times: Tensor, classes: Tensor, ends: Tensor, guidance: Tensor
) -> Tensor:
    """du/dt along the network's own velocity at t, r being kept: (B, c, h, w)."""
    direction = network(noisy, times, classes, times, guidance).to(noisy.dtype)
    with forward_ad.dual_level(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of a module that it loads at the first use
        moving = forward_ad.make_dual(noisy, direction), forward_ad.make_dual(times, torch.ones_like(times))
        found = forward_ad.unpack_dual(network(*moving, classes, ends, guidance)).tangent
    return found
