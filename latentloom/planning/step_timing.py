"""Time training steps on random data before a run, to predict its duration or to set its number of steps."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from stage1_tokenizer.latent_spec import LatentSpec
from stage1_tokenizer.losses.adversarial import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    prepare_for_compile,
    r1_penalty,
)
from stage1_tokenizer.losses.perceptual import perceptual_loss
from stage1_tokenizer.losses.reconstruction import reconstruction_terms, sum_weighted
from stage1_tokenizer.networks.discriminator import PatchDiscriminator
from stage1_tokenizer.registry import new_tokenizer
from stage1_tokenizer.tokenizer import TokenizerConfig
from stage1_tokenizer.training_config import TokenizerTraining
from stage2_prior.diffusion.mean_flow import MeanFlow
from stage2_prior.training_config import DiffusionTraining, PriorTraining
from training_harness.ema import EMA
from training_harness.errors import UserError
from training_harness.matmul_precision import reduced_matmul_precision
from training_harness.optimization import build_optimizer
from training_harness.processes import accelerated_device

WARM_UP_STEPS, MEASURED_STEPS = 1, 3


@dataclass(frozen=True)
class TimedStep:
    """Untrained networks of a stage, and one training step of them."""

    config: TokenizerTraining | PriorTraining
    device: torch.device
    networks: Mapping[str, nn.Module]
    """Trained networks by name; the first one is averaged and saved."""
    optimizer: torch.optim.Optimizer
    compute_loss: Callable[[int], Tensor]
    """Computes the loss of a step, from which the backward pass begins, for a number of images."""

    @property
    def main_network(self) -> nn.Module:
        """The network that is averaged and saved."""
        return next(iter(self.networks.values()))

    def train_batch(self, ema: EMA[nn.Module]) -> None:
        """Run forward and backward pass of one batch, and update the weights and their average."""
        with torch.autocast(self.device.type, *self._autocast_arguments()):
            loss = self.compute_loss(self.config.batch_size)
        loss.backward()
        nn.utils.clip_grad_norm_(self.main_network.parameters(), self.config.optimizer.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        ema.update(1)

    def _autocast_arguments(self) -> tuple[torch.dtype, bool]:
        precision = self.config.mixed_precision
        return (torch.float16 if precision == "fp16" else torch.bfloat16), precision != "no"

    def measure_seconds(self, at_least: float = 0.0) -> float:
        """Return the mean seconds of an optimizer step with all batches that it accumulates.

        Three batches are timed after one warm-up batch.

        Args:
            at_least: seconds for which batches are timed; a machine may slow down after the first seconds.
        """
        times = list[float]()
        ema = EMA(self.main_network, self.config.ema)
        for network in self.networks.values():
            network.to(memory_format=torch.channels_last)
            if self.config.compile:
                network.compile()
        with reduced_matmul_precision(self.device, self.config.matmul_precision == "high"):
            while len(times) < WARM_UP_STEPS + MEASURED_STEPS or sum(times[WARM_UP_STEPS:]) < at_least:
                begin = time.perf_counter()
                self.train_batch(ema)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
        return self.config.accumulation_steps * statistics.fmean(times[WARM_UP_STEPS:])


def time_tokenizer_step(config: TokenizerTraining, model_config: TokenizerConfig) -> TimedStep:
    """Build the step of a tokenizer with all its losses, as in the slower part of the run.

    The discriminator takes part from the first step when the recipe has one.

    Raises:
        UserError: the tokenizer is not trained.
    """
    check_trainable(config)
    device = accelerated_device()
    perceptual = perceptual_loss(config.perceptual)
    perceptual = perceptual and perceptual.to(device)
    adversarial = config.adversarial
    with device:
        model = new_tokenizer(model_config)
        discriminator = PatchDiscriminator(model_config.image_channels, adversarial.channels, adversarial.layers)
    model.train()
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()

    if config.compile and adversarial.weight > 0:
        prepare_for_compile(discriminator, adversarial)

    def compute_loss(images: int) -> Tensor:
        pixels = torch.rand(images, model_config.image_channels, *model_config.image_size, device=device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        output = model(pixels)
        terms = reconstruction_terms(output.reconstruction, pixels, config.reconstruction, perceptual)
        total = sum_weighted(terms, config.reconstruction)
        total = total + sum(output.losses.values())
        if adversarial.weight > 0:
            adversarial_loss = generator_loss(adversarial.loss, discriminator(output.reconstruction))
            if adversarial.adaptive:
                decoder: Any = model.decoder
                adversarial_loss = adaptive_weight(total, adversarial_loss, decoder.last_layer) * adversarial_loss
            total = total + adversarial_loss
            discriminator_input = torch.cat([pixels, output.reconstruction.detach()]).requires_grad_(adversarial.r1 > 0)
            real, fake = discriminator(discriminator_input).chunk(2)
            total = total + discriminator_loss(adversarial.loss, real, fake)
            if adversarial.r1 > 0:
                total = total + r1_penalty(real, discriminator_input)
        return total

    networks: dict[str, nn.Module] = {"tokenizer": model}
    if adversarial.weight > 0:
        networks["discriminator"] = discriminator
    return TimedStep(config, device, networks, build_optimizer(model, config.optimizer), compute_loss)


def check_trainable(config: TokenizerTraining) -> None:
    """Raise UserError when the tokenizer has no trained weights."""
    if not config.model.is_trainable:
        raise UserError(
            f"the tokenizer {config.model.name} has nothing to learn, so there is no training step to measure; expected a "
            "tokenizer with trained weights. Run the command without --dry-run and --overfit-batch"
        )


def time_prior_step(config: PriorTraining, spec: LatentSpec, num_classes: int) -> TimedStep:
    """Build the step of a prior on random codes of `spec`."""
    device = accelerated_device()
    with device:
        prior = config.new_prior(spec, num_classes).train()
    if config.gradient_checkpointing:
        prior.enable_gradient_checkpointing()

    step_numbers = itertools.count()

    def compute_loss(images: int) -> Tensor:
        labels = torch.full((images,), min(0, num_classes - 1), device=device)
        if isinstance(config, DiffusionTraining):
            latents, noise = torch.randn(2, images, spec.channels, spec.height, spec.width, device=device)
            times, ends, guidance = torch.rand(images, device=device), None, None
            # The targets of a mean flow keep no activations. They select images by value, which fake tensors lack.
            mean_flow = config.model.mean_flow
            if mean_flow and not isinstance(latents, FakeTensor) and learns_spans(mean_flow, next(step_numbers)):
                times, ends = mean_flow.make_spans(times, config.times.sample_times(torch.rand(images, device=device)))
                guidance = torch.full_like(times, mean_flow.max_guidance)
            degraded = None if config.degradation == "none" else noise
            return prior(latents, labels, times, noise, None, degraded, ends, guidance).total
        shape = (spec.levels,) * (spec.levels > 1) + (spec.height, spec.width)
        return prior(torch.randint(spec.codebook_size or 1, (images, *shape), device=device), labels).total

    return TimedStep(config, device, {"prior": prior}, build_optimizer(prior, config.optimizer), compute_loss)


def learns_spans(mean_flow: MeanFlow, step_number: int) -> bool:
    """Return whether a timed step learns spans of a mean flow, which takes longer than an instant.

    The share of such steps is as large as in a run, and they are evenly spread.
    """
    share = 1 - mean_flow.spans_from
    return math.floor((step_number + 1) * share) > math.floor(step_number * share)
