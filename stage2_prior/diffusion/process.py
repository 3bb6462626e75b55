r"""The noising process, and the kinds of prediction.

    x_t = α_t x + σ_t ε,    ε ~ N(0, I);    t = 0 is data (α 1, σ 0), t = 1 is noise, everywhere in this package

    prediction            target             estimate x̂                       error of x̂ / error of the prediction
    sample                x                  x̂                                1
    epsilon               ε                  (x_t − σ ε̂) / α                  σ / α
    v_prediction          α ε − σ x          (α x_t − σ v̂) / (α² + σ²)        σ / (α² + σ²)
    flow                  ε − x              (x_t − σ û) / (α + σ)            σ / (α + σ)

The estimate of the noise is ε̂ = (x_t − α x̂) / σ. v: Salimans, Ho 2022, arXiv 2202.00512. Flow, the velocity dx_t/dt of the straight
path α = 1 − t, σ = t: Liu et al. 2022, arXiv 2209.03003, Lipman et al. 2022, arXiv 2210.02747.
"""

from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

Prediction = Literal["epsilon", "sample", "v_prediction", "flow"]


Number = TypeVar("Number", float, Tensor)


class NoiseLevel(NamedTuple, Generic[Number]):
    """A time with its α and σ: numbers, or tensors that broadcast over latents."""

    time: Number
    alpha: Number
    sigma: Number


class Estimate(NamedTuple):
    """Estimates of the sample and the noise in x_t."""

    sample: Tensor  # x̂
    noise: Tensor  # ε̂


def add_noise(sample: Tensor, noise: Tensor, level: NoiseLevel[Number]) -> Tensor:
    """Return x_t = α x + σ ε."""
    return level.alpha * sample + level.sigma * noise


def compute_prediction(sample: Tensor, noise: Tensor, level: NoiseLevel[Number], kind: Prediction) -> Tensor:
    """Compute the exact prediction for a sample and noise: the training target."""
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
    """Compute the estimates of the sample and the noise in `noisy` from a prediction."""
    alpha, sigma = level.alpha, level.sigma
    match kind:
        case "sample":
            return Estimate(prediction, (noisy - alpha * prediction) / sigma)
        case "epsilon":
            return Estimate((noisy - sigma * prediction) / alpha, prediction)
        case "v_prediction":
            norm = alpha * alpha + sigma * sigma
            return Estimate((alpha * noisy - sigma * prediction) / norm, (sigma * noisy + alpha * prediction) / norm)
        case "flow":
            sample = (noisy - sigma * prediction) / (alpha + sigma)
            return Estimate(sample, sample + prediction)


def sample_error_factor(level: NoiseLevel[Tensor], kind: Prediction) -> Tensor:
    """Return the error of x̂ for an error of 1 in the prediction."""
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
