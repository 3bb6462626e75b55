"""Chooses recipes for a set of images and a machine, and says why."""

from dataclasses import dataclass

from stage1_tokenizer.survey import ImageSurvey

# Largest side of a picture, in pixels, and the downsampling factor that leaves at most 16×16 codes.
FACTORS = ((40, 4), (96, 8))
SMALL_PRIOR_IMAGES = 20_000
TOKENIZER_EPOCHS, PRIOR_EPOCHS = 60, 40
LEAST_STEPS = 400


@dataclass(frozen=True)
class Choice:
    tokenizer: str
    prior: str
    reasons: tuple[str, ...]


def tokenizer_recipe(size: tuple[int, int]) -> str:
    """The recipe for pictures of (height, width)."""
    factor = next((f for limit, f in FACTORS if max(size) <= limit), 16)
    return f"vqgan-f{factor}"


def choose(seen: ImageSurvey, size: tuple[int, int], images: int, device_type: str) -> Choice:
    """Recipes of both stages for `images` training pictures of `size` on a "cpu", "cuda" or "mps" device."""
    tokenizer = tokenizer_recipe(size)
    factor = int(tokenizer.removeprefix("vqgan-f"))
    small = device_type == "cpu" or images < SMALL_PRIOR_IMAGES
    prior = "ar-tiny" if small else "ar-small"
    kind = {1: "grey", 2: "grey and alpha", 3: "RGB", 4: "RGBA"}[seen.channels]
    codes = -(-size[0] // factor) * -(-size[1] // factor)
    return Choice(
        tokenizer,
        prior,
        (
            f"{images} training images, {kind}, used at {size[0]}×{size[1]}",
            f"tokenizer {tokenizer}: {codes} codes an image at a downsampling factor of {factor}",
            f"prior {prior}: "
            + (
                f"small, for {'a CPU' if device_type == 'cpu' else f'fewer than {SMALL_PRIOR_IMAGES} images'}"
                if small
                else f"for {images} images on a {device_type} device"
            ),
        ),
    )


def steps_for(images: int, batch_size: int, epochs: int, most: int) -> int:
    """Steps of `epochs` passes over the images, at least 400 and at most `most`: small sets overfit before that."""
    return max(LEAST_STEPS, min(most, epochs * images // batch_size))
