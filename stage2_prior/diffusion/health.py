"""A sign that latents are of another size than the noise that is laid on them, with what to do about it."""

from torch import Tensor

FAR_MEAN, FAR_STD = 0.2, 1.25  # from 0; from 1, as a factor either way


def normalization_warning(latents: Tensor) -> str | None:
    """What is to be said of latents (N, c, h, w) whose channels are not near zero mean and unit variance."""
    channels = latents.transpose(0, 1).flatten(1).double()
    means, stds = channels.mean(1), channels.std(1)
    far = (means.abs() > FAR_MEAN) | (stds > FAR_STD) | (stds < 1 / FAR_STD)
    if not far.any():
        return None
    worst = int((stds.clamp(min=1e-12).log().abs() + means.abs()).argmax())
    return (
        f"{int(far.sum())} of {len(far)} channels of the latents are far from mean 0 and standard deviation 1, such as channel "
        f"{worst} with {means[worst]:.2f} and {stds[worst]:.2f}: noise is too strong or too weak for them; these images are unlike "
        "those that the tokenizer was measured on: train the tokenizer on them, and run latentloom tokenize again"
    )
