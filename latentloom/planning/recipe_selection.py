"""Select an image size and recipes for a data set and a device, and give the reasons."""

from dataclasses import dataclass

from stage1_tokenizer.data.statistics import DatasetStatistics

# Pairs of the longest image side in pixels and the downsampling factor that gives at most 16×16 codes. Latents have more
# channels than codes, so fewer positions are enough.
FACTORS = ((40, 4), (96, 8), (256, 16))
LATENT_FACTORS = ((96, 8), (256, 16))
LARGEST_SIDE, LARGEST_FACTOR = FACTORS[-1]
SMALL_PRIOR_IMAGES = 20_000
TOKENIZER_EPOCHS, PRIOR_EPOCHS = 60, 20
MIN_STEPS = 400
CHANNEL_NAMES = {1: "grey", 2: "grey and alpha", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class RecipeSelection:
    """Image size (height, width), names of the two recipes, and one printed line per reason."""

    size: tuple[int, int]
    tokenizer: str
    prior: str
    reasons: tuple[str, ...]


def select_recipes(
    statistics: DatasetStatistics,
    images: int,
    device_type: str,
    *,
    size: tuple[int, int] | None = None,
    tokenizer: str | None = None,
    prior: str | None = None,
) -> RecipeSelection:
    """Select the image size and the recipes for a training set.

    Args:
        statistics: statistics of the training images.
        images: number of training images.
        device_type: "cpu", "cuda" or "mps".
        size: (height, width) that the user requested, or None.
        tokenizer: tokenizer recipe that the user requested, or None.
        prior: prior recipe that the user requested, or None.
    """
    common_size = statistics.most_common_size
    height, width = selected_size = size or select_size(common_size)
    size_reason = "as requested" if size else "the most common size"
    if selected_size != common_size and not size:
        size_reason = (
            f"the most common size {common_size[0]}×{common_size[1]}, reduced; pass --resolution to set another size"
        )
    channels = CHANNEL_NAMES.get(statistics.channels, f"{statistics.channels} channels")
    reasons = [f"{images} training images, {channels}, used at {height}×{width}: {size_reason}"]

    uses_latents = prior is not None and prior.startswith("diffusion-")
    factors = LATENT_FACTORS if uses_latents else FACTORS
    factor = next((f for limit, f in factors if max(selected_size) <= limit), LARGEST_FACTOR)
    positions = -(-height // factor) * -(-width // factor)
    tokenizer_reason = (
        f"{positions} {'latent positions' if uses_latents else 'codes'} per image at a downsampling factor of {factor}"
        if tokenizer is None
        else "as requested"
    )
    if tokenizer is None and uses_latents and str(prior).endswith("-pixels"):
        tokenizer, tokenizer_reason = "identity", "the prior works on pixels"
    tokenizer = tokenizer or f"{'kl' if uses_latents else 'vqgan'}-f{factor}"
    reasons.append(f"tokenizer {tokenizer}: {tokenizer_reason}")

    if prior:
        prior_reason = "as requested"
    elif device_type == "cpu":
        prior, prior_reason = "ar-tiny", "small, for a CPU"
    elif images < SMALL_PRIOR_IMAGES:
        prior, prior_reason = "ar-tiny", f"small, for fewer than {SMALL_PRIOR_IMAGES} images"
    else:
        prior, prior_reason = "ar-small", f"for {images} images on a {device_type} device"
    reasons.append(f"prior {prior}: {prior_reason}")
    return RecipeSelection(selected_size, tokenizer, prior, tuple(reasons))


def select_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return `size`, reduced to at most 256 pixels per side with nearly the same aspect ratio.

    Photographs have thousands of pixels per side: their grid of codes is too large for a prior. A reduced side is a
    multiple of 16.
    """
    longest_side = max(size)
    if longest_side <= LARGEST_SIDE:
        return size
    height, width = (
        max(1, round(side * LARGEST_SIDE / longest_side / LARGEST_FACTOR)) * LARGEST_FACTOR for side in size
    )
    return height, width


def select_max_steps(images: int, batch_size: int, epochs: int, recipe_steps: int) -> int:
    """Return the steps of `epochs` epochs, between 400 and the recipe's steps: more steps would overfit a small data set."""
    return max(MIN_STEPS, min(recipe_steps, epochs * images // batch_size))
