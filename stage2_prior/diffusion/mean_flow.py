r"""Mean flow: the network predicts the mean velocity from t down to r, so that one step crosses the whole span.

    u(z_t, r, t) = 1 / (t − r) ∫_r^t v(z_s, s) ds        z_r = z_t − (t − r) u(z_t, r, t),     u(z_t, t, t) = v(z_t, t)

The derivative in t gives v = u + (t − r) du/dt. Training fits the right side to the velocity of the example:

    V = u_θ(z, r, t) + (t − r) sg[du/dt],     du/dt = ∂_z u · u_θ(z, t, t) + ∂_t u         in forward mode, one pass
    L = E ‖V − ṽ‖²,     ṽ = ω (ε − x) + (1 − ω) sg[u_θ(z, t, t | no class)]

Each example has the weight 1 / (sg[squared error] + c), since guidance and the derivative make some targets much noisier than
others. The guidance scale ω is sampled uniformly and is an input of the network, so that guidance needs no second evaluation.
Geng et al. 2025, arXiv 2505.13447. The direction u_θ(z, t, t) instead of ε − x, and ω as an input: arXiv 2512.02012. The run starts
with a plain flow (`spans_from`), since the two terms of the loss conflict: Zhang et al. 2025, arXiv 2510.20771.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from stage2_prior.conditioning.classes import apply_guidance, has_class
from training_harness.errors import ConfigError
from training_harness.precision import upcast


@dataclass(frozen=True, kw_only=True)
class MeanFlow:
    max_guidance: float = 4.0
    """Largest guidance scale that the network learns."""
    instant_share: float = 0.5
    """Share of the images, in (0, 1], that learn the velocity at one time and not the mean velocity of a span."""
    spans_from: float = 0.0
    """Share of the run, in [0, 1), that first learns a plain flow. Its steps take half the time."""

    def __post_init__(self) -> None:
        section = "model.mean_flow"
        if not self.max_guidance >= 1:
            raise ConfigError(f"{section}.max_guidance is {self.max_guidance}; expected 1 (no guidance) or more")
        if not 0 < self.instant_share <= 1:
            raise ConfigError(
                f"{section}.instant_share is {self.instant_share}; expected a share in (0, 1], such as 0.5"
            )
        if not 0 <= self.spans_from < 1:
            raise ConfigError(f"{section}.spans_from is {self.spans_from}; expected a share in [0, 1), such as 0.5")

    def make_spans(self, times: Tensor, other_times: Tensor) -> tuple[Tensor, Tensor]:
        """Return the starts and the ends of spans between two times of each image, (B,) each.

        The first images, `instant_share` of them, have spans of length 0 at `times`.
        """
        is_instant = torch.arange(len(times), device=times.device) < round(self.instant_share * len(times))
        other_times = torch.where(is_instant, times, other_times)
        return torch.maximum(times, other_times), torch.minimum(times, other_times)


Network = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Predicts û from z (B, c, h, w), t, class ids, r and ω, (B,) each."""


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
    """Compute the errors V − ṽ of a mean flow.

    Args:
        network: Predicts û.
        noisy: (B, c, h, w) noisy latents z_t.
        velocity: (B, c, h, w) velocities ε − x.
        times: (B,) times t in (0, 1].
        classes: (B,) int64 class ids. Without a class ω is 1.
        null_class: Id of the null class.
        ends: (B,) ends r of the spans, in [0, t].
        guidance: (B,) guidance scales ω, at least 1.

    Returns:
        (B, c, h, w) in float32 or wider.
    """
    guidance = torch.where(has_class(classes, null_class), guidance, 1.0)
    predicted = upcast(network(noisy, times, classes, ends, guidance))
    with torch.no_grad():
        target = upcast(velocity).clone()
        if len(rows := (guidance > 1).nonzero()[:, 0]):
            null, row_times = torch.full_like(classes[rows], null_class), times[rows]
            null_prediction = upcast(network(noisy[rows], row_times, null, row_times, torch.ones_like(row_times)))
            target[rows] = apply_guidance(target[rows], null_prediction, guidance[rows].view(-1, 1, 1, 1))
        if len(rows := (ends < times).nonzero()[:, 0]):
            derivative = total_derivative(network, noisy[rows], times[rows], classes[rows], ends[rows], guidance[rows])
            target[rows] -= (times - ends)[rows].view(-1, 1, 1, 1) * upcast(derivative)
    return predicted - target


@torch.no_grad()
def total_derivative(
    network: Network, noisy: Tensor, times: Tensor, classes: Tensor, ends: Tensor, guidance: Tensor
) -> Tensor:
    """Compute du/dt (B, c, h, w) along the network's velocity at t, with a constant r."""
    direction = network(noisy, times, classes, times, guidance).to(noisy.dtype)
    with forward_ad.dual_level(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from a module that torch loads at the first use
        duals = forward_ad.make_dual(noisy, direction), forward_ad.make_dual(times, torch.ones_like(times))
        return forward_ad.unpack_dual(network(*duals, classes, ends, guidance)).tangent
