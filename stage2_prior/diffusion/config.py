"""Options of the diffusion prior: the section `model` and the fields of config.json."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from stage1_tokenizer.data.degradation import Degradation
from stage2_prior.checks import check_sizes
from stage2_prior.diffusion.mean_flow import MeanFlow
from stage2_prior.diffusion.process import Prediction
from stage2_prior.diffusion.sampling import DiffusionOptions
from stage2_prior.diffusion.schedule import NUM_LEVELS, Schedule
from stage2_prior.migration import DIFFUSION_MODEL
from training_harness.errors import ConfigError, UserError
from training_harness.migration import Migration
from training_harness.pretrained import StrictConfig, strict_config


@dataclass(frozen=True, kw_only=True)
class DenoiserModel:
    """Options that all denoisers share, in the section `model`."""

    name: str
    """Denoiser: dit is a transformer over patches; unet is a convolutional U-Net for small images and pixels."""
    hidden_size: int = 384
    """Width of the denoiser; channels at the first resolution for a U-Net."""
    num_layers: int = 12
    """Number of transformer blocks; blocks at each resolution for a U-Net."""
    schedule: Schedule = "flow"
    """Noise schedule: `flow` follows straight lines; linear, scaled-linear and cosine have 1,000 levels as in DDPM."""
    prediction: Prediction = "flow"
    """What the network predicts: the velocity of the flow, v, the noise (epsilon), or the sample."""
    zero_terminal_snr: bool = False
    """Makes the last level of linear, scaled-linear and cosine pure noise."""

    def check(self, height: int, width: int) -> None:
        """Raise ConfigError for values that do not give a valid network for latents of this size."""
        check_sizes(self, ("hidden_size", "num_layers"))
        if self.zero_terminal_snr and self.schedule == "flow":
            raise ConfigError(
                "model.zero_terminal_snr is true and the schedule is flow, which always ends with pure noise; expected it with "
                "linear, scaled-linear or cosine. Leave it out."
            )
        if self.prediction == "epsilon" and (self.zero_terminal_snr or self.schedule == "flow"):
            raise ConfigError(
                f"model.prediction is epsilon and the schedule {self.schedule} ends with pure noise, where epsilon gives no "
                "information about the sample; expected v_prediction, flow or sample"
            )


@dataclass(frozen=True, kw_only=True)
class DiTModel(DenoiserModel):
    name: Literal["dit"] = "dit"
    patch_size: int = 1
    """Height and width of a patch, in latents. Each patch is one token."""
    num_heads: int = 6
    """Number of attention heads."""
    intermediate_size: int = 1536
    """Width of the feed-forward layers."""
    feed_forward: Literal["gelu", "swiglu"] = "gelu"
    """Kind of the feed-forward layers."""
    norm: Literal["layer", "rms"] = "layer"
    """Kind of the norms: layer norm or RMS norm."""
    qk_norm: bool = False
    """Normalise queries and keys before attention."""
    positions: Literal["sincos", "2d"] = "sincos"
    """`sincos` adds sines and cosines to the tokens; `2d` uses rotary positions along rows and columns."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    mean_flow: MeanFlow | None = None
    """Mean flow, for sampling in a few steps. Set one of its options, such as max_guidance, to use it. (default: none)"""

    def check(self, height: int, width: int) -> None:
        check_sizes(self, ("patch_size", "num_heads", "intermediate_size"))
        if height % self.patch_size or width % self.patch_size:
            raise ConfigError(
                f"model.patch_size is {self.patch_size} for {height}×{width} latents; expected a number that divides "
                "both sides, such as 1"
            )
        if self.hidden_size % (4 * self.num_heads):
            raise ConfigError(
                f"model.hidden_size is {self.hidden_size} for {self.num_heads} heads; expected a multiple of {4 * self.num_heads}"
            )
        super().check(height, width)
        if self.mean_flow and (self.schedule, self.prediction) != ("flow", "flow"):
            raise ConfigError(
                f"model.mean_flow is set with the schedule {self.schedule} and the prediction {self.prediction}; expected "
                "flow and flow"
            )


@dataclass(frozen=True, kw_only=True)
class UNetModel(DenoiserModel):
    name: Literal["unet"] = "unet"
    channel_multipliers: tuple[int, ...]
    """Channels at each resolution, in multiples of hidden_size, such as 1 2 2. Each resolution has num_layers blocks."""
    attention: tuple[int, ...] = ()
    """Downsampling factors at which blocks have attention. The middle always has attention."""

    @property
    def mean_flow(self) -> None:
        """None, since a mean flow needs a DiT."""

    def check(self, height: int, width: int) -> None:
        super().check(height, width)
        if not self.channel_multipliers or any(m < 1 for m in self.channel_multipliers):
            raise ConfigError(
                f"model.channel_multipliers is {list(self.channel_multipliers)}; expected positive whole numbers, such as 1 2 2"
            )
        factors = [2**level for level in range(len(self.channel_multipliers))]
        if absent := set(self.attention) - set(factors):
            raise ConfigError(
                f"model.attention has {', '.join(map(str, sorted(absent)))}, and the denoiser has the downsampling factors "
                f"{', '.join(map(str, factors))}; expected only factors of the denoiser. Leave the others out."
            )
        if height % factors[-1] or width % factors[-1]:
            raise ConfigError(
                f"model.channel_multipliers halves the size {len(factors) - 1} times, and {height}×{width} latents are not a "
                f"multiple of {factors[-1]}; expected fewer multipliers, or images of another size"
            )


DiffusionModel = DiTModel | UNetModel
"""A section without a name is a DiTModel."""


@strict_config
class DiffusionPriorConfig(StrictConfig):
    """Fields of config.json."""

    model_type: ClassVar[str] = "latentloom-diffusion"
    migration: ClassVar[Migration] = DIFFUSION_MODEL
    model_options: ClassVar[Any] = DiffusionModel

    model: DiffusionModel = field(default_factory=DiTModel)
    channels: int = 16
    height: int = 8
    width: int = 8
    num_classes: int = 0
    degradation: Degradation = "none"
    """Degradation that the prior restores. The network then takes the latents of degraded images as additional channels."""
    tokenizer_id: str = ""
    """Id of the tokenizer that wrote the training latents."""

    @property
    def input_channels(self) -> int:
        return self.channels if self.degradation == "none" else 2 * self.channels

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_sizes(self, ("channels", "height", "width"))
        self.model.check(self.height, self.width)
        if self.model.mean_flow and self.degradation != "none":
            raise ConfigError(
                f"model.mean_flow is set and the degradation is {self.degradation}; expected one of them. Pass "
                "`--degradation none` or `--model.mean-flow none`."
            )

    def check_sampling(self, options: DiffusionOptions) -> None:
        """Raise UserError for sampling options that the prior does not support."""
        schedule, mean_flow = self.model.schedule, self.model.mean_flow
        if schedule != "flow" and options.num_inference_steps > NUM_LEVELS:
            raise UserError(
                f"num_inference_steps is {options.num_inference_steps} and the schedule {schedule} has {NUM_LEVELS} levels; "
                f"expected at most {NUM_LEVELS}"
            )
        if mean_flow and not 1 <= options.guidance_scale <= mean_flow.max_guidance:
            raise UserError(
                f"guidance_scale is {options.guidance_scale} and this mean flow learned guidance from 1 to "
                f"{mean_flow.max_guidance:g}; expected a scale in this range. Train with a larger model.mean_flow.max_guidance to "
                "sample with more."
            )
        if mean_flow and options.guidance_rescale:
            raise UserError(
                f"guidance_rescale is {options.guidance_rescale} and the prior is a mean flow, which learns guidance; expected 0"
            )
