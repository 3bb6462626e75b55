"""Configuration of the diffusion prior, as it stands in a model's config.json."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict

from stage1_tokenizer.data.degradation import Degradation
from stage2_prior.diffusion.process import Prediction
from stage2_prior.diffusion.sampling import DiffusionOptions
from stage2_prior.diffusion.schedule import LEVELS, Schedule
from training_harness.errors import ConfigError, UserError
from training_harness.pretrained import StrictConfig


@strict
class DiffusionPriorConfig(StrictConfig):
    model_type: ClassVar[str] = "latentloom-diffusion"

    channels: int = 16
    height: int = 8
    width: int = 8
    num_classes: int = 0
    denoiser: Literal["dit", "unet"] = "dit"
    patch_size: int = 1
    """Sides of the square of latents that is a token."""
    hidden_size: int = 384
    num_layers: int = 12
    num_heads: int = 6
    intermediate_size: int = 1536
    feed_forward: Literal["gelu", "swiglu"] = "gelu"
    norm: Literal["layer", "rms"] = "layer"
    qk_norm: bool = False
    positions: Literal["sincos", "2d"] = "sincos"
    """Sines and cosines added to the tokens, or rotary positions along rows and columns."""
    rope_theta: float | int = 10_000.0
    channel_multipliers: tuple[int, ...] | list[int] = ()
    """Of a U-Net: channels at each resolution, in multiples of hidden_size; its num_layers are blocks a resolution."""
    attention: tuple[int, ...] | list[int] = ()
    """Of a U-Net: downsampling factors at which its blocks attend; the middle always does."""
    schedule: Schedule = "flow"
    prediction: Prediction = "flow"
    zero_terminal_snr: bool = False
    mean_flow: bool = False
    """Whether the network tells the mean velocity between two times, for sampling in a few steps."""
    max_guidance: float | int = 4.0
    """Of a mean flow: up to which guidance scale it learns."""
    degradation: Degradation = "none"
    """Of the pictures that it restores, whose latents it is given beside the noisy ones."""
    tokenizer_id: str = ""
    """Of the tokenizer whose latents the prior was trained on."""

    @property
    def input_channels(self) -> int:
        return self.channels if self.degradation == "none" else 2 * self.channels

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in (
            "channels",
            "height",
            "width",
            "patch_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "intermediate_size",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; expected a whole number of at least 1")
        if self.height % self.patch_size or self.width % self.patch_size:
            raise ConfigError(
                f"model.patch_size is {self.patch_size} for {self.height}×{self.width} latents; expected a number that divides "
                "both sides, such as 1"
            )
        if self.denoiser == "dit" and self.hidden_size % (4 * self.num_heads):
            raise ConfigError(
                f"model.hidden_size is {self.hidden_size} for {self.num_heads} heads; expected a multiple of {4 * self.num_heads}"
            )
        self._check_unet()
        if self.zero_terminal_snr and self.schedule == "flow":
            raise ConfigError(
                "model.zero_terminal_snr is true for a flow, which ends with noise alone as it is; expected it with linear, "
                "scaled-linear or cosine; leave it out"
            )
        if self.prediction == "epsilon" and (self.zero_terminal_snr or self.schedule == "flow"):
            raise ConfigError(
                f"model.prediction is epsilon and the schedule {self.schedule} ends with noise alone, of which it tells nothing; "
                "expected v_prediction, flow or sample"
            )

        if self.mean_flow and (self.denoiser, self.schedule, self.prediction) != ("dit", "flow", "flow"):
            raise ConfigError(
                f"model.mean_flow is true with the denoiser {self.denoiser}, the schedule {self.schedule} and the prediction "
                f"{self.prediction}; expected dit, flow and flow"
            )
        if self.mean_flow and self.degradation != "none":
            raise ConfigError(
                f"model.mean_flow is true and the degradation {self.degradation}; expected one of them; give "
                "--degradation none, or --model.mean-flow False"
            )
        if not self.max_guidance >= 1:
            raise ConfigError(
                f"model.max_guidance is {self.max_guidance}; expected 1, which is without guidance, or more"
            )

    def check_sampling(self, options: DiffusionOptions) -> None:
        """Raises UserError for what a prior of this kind does not sample with."""
        if self.schedule != "flow" and options.num_inference_steps > LEVELS:
            raise UserError(
                f"num_inference_steps is {options.num_inference_steps} and the schedule {self.schedule} has {LEVELS} levels; "
                f"expected at most {LEVELS}"
            )
        if self.mean_flow and not 1 <= options.guidance_scale <= self.max_guidance:
            raise UserError(
                f"guidance_scale is {options.guidance_scale} and this mean flow learnt guidance from 1 to {self.max_guidance:g}; "
                "expected a number between; a larger model.max_guidance in training allows more"
            )
        if self.mean_flow and options.guidance_rescale:
            raise UserError(
                f"guidance_rescale is {options.guidance_rescale} with a mean flow, whose guidance is learnt; expected 0"
            )

    def _check_unet(self) -> None:
        if (self.denoiser == "unet") != bool(self.channel_multipliers) or any(m < 1 for m in self.channel_multipliers):
            raise ConfigError(
                f"model.channel_multipliers is {list(self.channel_multipliers)} with the denoiser {self.denoiser}; expected "
                "positive whole numbers for unet, such as 1 2 2, and none for dit"
            )
        factors = [2**level for level in range(len(self.channel_multipliers))]
        if absent := set(self.attention) - set(factors):
            raise ConfigError(
                f"model.attention has {', '.join(map(str, sorted(absent)))}, and the denoiser has resolutions at the factors "
                f"{', '.join(map(str, factors)) or 'none'}; expected some of those; leave the others out"
            )
        if factors and (self.height % factors[-1] or self.width % factors[-1]):
            raise ConfigError(
                f"model.channel_multipliers halves {len(factors) - 1} times, and {self.height}×{self.width} latents are no "
                f"multiple of {factors[-1]}; expected fewer of them, or images of another size"
            )
