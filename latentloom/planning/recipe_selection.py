"""Chooses a size and recipes for a set of images and a machine, and says why."""

from dataclasses import dataclass

from stage1_tokenizer.data.statistics import DatasetStatistics

# Largest side of a picture, in pixels, and the downsampling factor that leaves at most 16×16 codes; of latents, which
# have more channels, fewer do.
FACTORS = ((40, 4), (96, 8), (256, 16))
LATENT_FACTORS = ((96, 8), (256, 16))
LARGEST_SIDE, LARGEST_FACTOR = FACTORS[-1]
SMALL_PRIOR_IMAGES = 20_000
TOKENIZER_EPOCHS, PRIOR_EPOCHS = 60, 20
MIN_STEPS = 400
CHANNEL_NAMES = {1: "grey", 2: "grey and alpha", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class RecipeSelection:
    size: tuple[int, int]
    tokenizer: str
    prior: str
    reasons: tuple[str, ...]


def select_recipes(
    seen: DatasetStatistics,
    images: int,
    device_type: str,
    *,
    size: tuple[int, int] | None = None,
    tokenizer: str | None = None,
    prior: str | None = None,
) -> RecipeSelection:
    """What to train on `images` training pictures with a "cpu", "cuda" or "mps" device.

    `size` (height, width) and the recipes' names are the user's where given.
    """
    whole = seen.commonest_size
    height, width = used = size or select_size(whole)
    why_size = "as asked" if size else "the commonest size"
    if used != whole and not size:
        why_size = f"the commonest size {whole[0]}×{whole[1]}, reduced; --resolution sets another"
    channels = CHANNEL_NAMES.get(seen.channels, f"{seen.channels} channels")
    reasons = [f"{images} training images, {channels}, used at {height}×{width}: {why_size}"]

    of_latents = prior is not None and prior.startswith("diffusion-")
    factors = LATENT_FACTORS if of_latents else FACTORS
    factor = next((f for limit, f in factors if max(used) <= limit), LARGEST_FACTOR)
    codes = -(-height // factor) * -(-width // factor)
    why_tokenizer = (
        f"{codes} {'places' if of_latents else 'codes'} an image at a downsampling factor of {factor}"
        if tokenizer is None
        else "as asked"
    )
    if tokenizer is None and of_latents and str(prior).endswith("-pixels"):
        tokenizer, why_tokenizer = "identity", "the prior works on pixels"
    tokenizer = tokenizer or f"{'kl' if of_latents else 'vqgan'}-f{factor}"
    reasons.append(f"tokenizer {tokenizer}: {why_tokenizer}")

    if prior:
        why_prior = "as asked"
    elif device_type == "cpu":
        prior, why_prior = "ar-tiny", "small, for a CPU"
    elif images < SMALL_PRIOR_IMAGES:
        prior, why_prior = "ar-tiny", f"small, for fewer than {SMALL_PRIOR_IMAGES} images"
    else:
        prior, why_prior = "ar-small", f"for {images} images on a {device_type} device"
    reasons.append(f"prior {prior}: {why_prior}")
    return RecipeSelection(used, tokenizer, prior, tuple(reasons))


def select_size(size: tuple[int, int]) -> tuple[int, int]:
    """`size`, or where a side is longer than 256 the nearest shape within 256×256 in multiples of the factor.

    Photographs come in thousands of pixels a side, which no prior of ours could learn as one grid of codes.
    """
    longest = max(size)
    if longest <= LARGEST_SIDE:
        return size
    height, width = (max(1, round(side * LARGEST_SIDE / longest / LARGEST_FACTOR)) * LARGEST_FACTOR for side in size)
    return height, width


def select_max_steps(images: int, batch_size: int, epochs: int, most: int) -> int:
    """Steps of `epochs` passes over the images, at least 400 and at most `most`: small sets overfit before that."""
    return max(MIN_STEPS, min(most, epochs * images // batch_size))
