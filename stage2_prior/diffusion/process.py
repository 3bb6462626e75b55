r"""What noise does to latents, and what a network can say of it.

    x_t = α_t x + σ_t ε,    ε ~ N(0, I);    t = 0 is data (α 1, σ 0), t = 1 is noise, everywhere in this package

    a network predicts    that is            from which the latents are       and x̂ errs by
    sample                x                  x̂                                1 · its own error
    epsilon               ε                  (x_t − σ ε̂) / α                  σ / α
    v_prediction          α ε − σ x          (α x_t − σ v̂) / (α² + σ²)        σ / (α² + σ²)
    flow                  ε − x              (x_t − σ û) / (α + σ)            σ / (α + σ)

and the noise is ε̂ = (x_t − α x̂) / σ. v: Salimans, Ho 2022, arXiv 2202.00512; flow, the velocity dx_t/dt of the straight path
α = 1 − t, σ = t: Liu et al. 2022, arXiv 2209.03003, Lipman et al. 2022, arXiv 2210.02747.
"""

from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

Prediction = Literal["epsilon", "sample", "v_prediction", "flow"]


Number = TypeVar("Number", float, Tensor)


class NoiseLevel(NamedTuple, Generic[Number]):
    """A time, what is left of the data there and how much noise: numbers, or tensors that broadcast over latents."""

    time: Number
    alpha: Number
    sigma: Number


class Estimate(NamedTuple):
    """What a network makes of x_t, whatever it predicts."""

    sample: Tensor  # x̂, of the data
    noise: Tensor  # ε̂


def add_noise(sample: Tensor, noise: Tensor, level: NoiseLevel[Number]) -> Tensor:
    return level.alpha * sample + level.sigma * noise


def compute_prediction(sample: Tensor, noise: Tensor, level: NoiseLevel[Number], kind: Prediction) -> Tensor:
    """What a network that knows both would predict: the target of training."""
    match kind:
        case "sample":
            return sample
        case "epsilon":
            return noise
        case "v_prediction":
            return level.alpha * noise - level.sigma * sample
        case "flow":
            return noise - sample


def compute_estimate(noisy: Tensor, prediction: Tensor, level: NoiseLevel[Number], kind: Prediction) -> Estimate:
    """Of the data and of the noise in `noisy`; of both the one that divides by little is found first."""
    alpha, sigma = level.alpha, level.sigma
    match kind:
        case "sample":
            return Estimate(prediction, (noisy - alpha * prediction) / sigma)
        case "epsilon":
            return Estimate((noisy - sigma * prediction) / alpha, prediction)
        case "v_prediction":
            size = alpha * alpha + sigma * sigma
            return Estimate((alpha * noisy - sigma * prediction) / size, (sigma * noisy + alpha * prediction) / size)
        case "flow":
            sample = (noisy - sigma * prediction) / (alpha + sigma)
            return Estimate(sample, sample + prediction)


def sample_error_factor(level: NoiseLevel[Tensor], kind: Prediction) -> Tensor:
    """By what x̂ errs where the prediction errs by 1."""
    alpha, sigma = level.alpha, level.sigma
    match kind:
        case "sample":
            return torch.ones_like(sigma)
        case "epsilon":
            return sigma / alpha
        case "v_prediction":
            return sigma / (alpha * alpha + sigma * sigma)
        case "flow":
            return sigma / (alpha + sigma)
