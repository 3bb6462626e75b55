"""Warning about latents that are not normalized, so that the noise does not fit them."""

from torch import Tensor

MAX_MEAN, MAX_STD_FACTOR = 0.2, 1.25  # the standard deviation may be larger or smaller than 1 by this factor


def normalization_warning(latents: Tensor) -> str | None:
    """Return a warning when channels of latents (N, c, h, w) are far from zero mean and unit variance."""
    channels = latents.transpose(0, 1).flatten(1).double()
    means, stds = channels.mean(1), channels.std(1)
    far = (means.abs() > MAX_MEAN) | (stds > MAX_STD_FACTOR) | (stds < 1 / MAX_STD_FACTOR)
    if not far.any():
        return None
    worst = int((stds.clamp(min=1e-12).log().abs() + means.abs()).argmax())
    return (
        f"{int(far.sum())} of {len(far)} channels of the latents are far from mean 0 and standard deviation 1, such as channel "
        f"{worst} with {means[worst]:.2f} and {stds[worst]:.2f}: the noise is too strong or too weak for them, and the images "
        "differ from the training images of the tokenizer. Train the tokenizer on them, then run `latentloom tokenize` again."
    )
