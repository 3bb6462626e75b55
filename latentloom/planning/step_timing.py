"""Training steps on random data, before a run or in place of one: to say what a step takes, or how many fit into a time."""

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
    allow_compiling,
    discriminator_loss,
    generator_loss,
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

WARM_UP, MEASURED = 1, 3


@dataclass(frozen=True)
class TimedStep:
    """A stage's networks, untrained, and a step of theirs.

    `parts` are the trained networks by name, `loss` is all that a step's backward pass begins from, for so many images.
    """

    config: TokenizerTraining | PriorTraining
    device: torch.device
    parts: Mapping[str, nn.Module]
    optimizer: torch.optim.Optimizer
    loss: Callable[[int], Tensor]

    @property
    def main(self) -> nn.Module:
        """The network that is averaged and saved."""
        return next(iter(self.parts.values()))

    def step(self, average: EMA[nn.Module]) -> None:
        with torch.autocast(self.device.type, *self._precision()):
            loss = self.loss(self.config.batch_size)
        loss.backward()
        nn.utils.clip_grad_norm_(self.main.parameters(), self.config.optimizer.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        average.update(1)

    def _precision(self) -> tuple[torch.dtype, bool]:
        wanted = self.config.mixed_precision
        return (torch.float16 if wanted == "fp16" else torch.bfloat16), wanted != "no"

    def seconds_per_step(self, at_least: float = 0.0) -> float:
        """Mean seconds of an optimiser step, with all the batches that it accumulates.

        Of three after one that does not count, or of as many as fill `at_least` seconds: a machine may be quicker at first
        than it stays.
        """
        times = list[float]()
        average = EMA(self.main, self.config.ema)
        for part in self.parts.values():
            part.to(memory_format=torch.channels_last)
            if self.config.compile:
                part.compile()
        with reduced_matmul_precision(self.device, self.config.matmul_precision == "high"):
            while len(times) < WARM_UP + MEASURED or sum(times[WARM_UP:]) < at_least:
                begin = time.perf_counter()
                self.step(average)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
        return self.config.accumulation_steps * statistics.fmean(times[WARM_UP:])


def time_tokenizer_step(config: TokenizerTraining, model_config: TokenizerConfig) -> TimedStep:
    """With the perceptual loss, and the discriminator at work where the recipe has one: the slower part of the run.

    Raises UserError of a tokenizer that has nothing to learn.
    """
    check_learns(config)
    device = accelerated_device()
    perceptual = perceptual_loss(config.perceptual)
    perceptual = perceptual and perceptual.to(device)
    adversarial = config.adversarial
    with device:
        model = new_tokenizer(model_config)
        critic = PatchDiscriminator(model_config.image_channels, adversarial.channels, adversarial.layers)
    model.train()
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()

    if config.compile and adversarial.weight > 0:
        allow_compiling(critic, adversarial)

    def loss(images: int) -> Tensor:
        pixels = torch.rand(images, model_config.image_channels, *model_config.image_size, device=device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        output = model(pixels)
        terms = reconstruction_terms(output.reconstruction, pixels, config.reconstruction, perceptual)
        total = sum_weighted(terms, config.reconstruction)
        total = total + sum(output.losses.values())
        if adversarial.weight > 0:
            heard = generator_loss(adversarial.loss, critic(output.reconstruction))
            if adversarial.adaptive:
                decoder: Any = model.decoder
                heard = adaptive_weight(total, heard, decoder.last_layer) * heard
            total = total + heard
            pair = torch.cat([pixels, output.reconstruction.detach()]).requires_grad_(adversarial.r1 > 0)
            real, fake = critic(pair).chunk(2)
            total = total + discriminator_loss(adversarial.loss, real, fake)
            if adversarial.r1 > 0:
                total = total + r1_penalty(real, pair)
        return total

    parts: dict[str, nn.Module] = {"tokenizer": model}
    if adversarial.weight > 0:
        parts["discriminator"] = critic
    return TimedStep(config, device, parts, build_optimizer(model, config.optimizer), loss)


def check_learns(config: TokenizerTraining) -> None:
    if not config.model.learns:
        raise UserError(
            f"the tokenizer {config.model.name} has nothing to learn, so it has no training steps to look at; expected one that "
            "learns; run the command without --dry-run and --overfit-batch"
        )


def time_prior_step(config: PriorTraining, spec: LatentSpec, num_classes: int) -> TimedStep:
    device = accelerated_device()
    with device:
        prior = config.new_prior(spec, num_classes).train()
    if config.gradient_checkpointing:
        prior.enable_gradient_checkpointing()

    numbers = itertools.count()

    def loss(images: int) -> Tensor:
        labels = torch.full((images,), min(0, num_classes - 1), device=device)
        if isinstance(config, DiffusionTraining):
            latents, noise = torch.randn(2, images, spec.channels, spec.height, spec.width, device=device)
            times, ends, guidance = torch.rand(images, device=device), None, None
            # its targets keep nothing, and choose images by numbers, which fake tensors have not
            mean_flow = config.model.mean_flow
            if mean_flow and not isinstance(latents, FakeTensor) and has_spans(mean_flow, next(numbers)):
                times, ends = mean_flow.spans(times, config.times.shares(torch.rand(images, device=device)))
                guidance = torch.full_like(times, mean_flow.max_guidance)
            degraded = None if config.degradation == "none" else noise
            return prior(latents, labels, times, noise, None, degraded, ends, guidance).total
        shape = (spec.levels,) * (spec.levels > 1) + (spec.height, spec.width)
        return prior(torch.randint(spec.codebook_size or 1, (images, *shape), device=device), labels).total

    return TimedStep(config, device, {"prior": prior}, build_optimizer(prior, config.optimizer), loss)


def has_spans(mean_flow: MeanFlow, number: int) -> bool:
    """Whether a step learns spans, which takes longer: of rehearsed ones as large a share as of a run's, evenly spread."""
    share = 1 - mean_flow.spans_from
    return math.floor((number + 1) * share) > math.floor(number * share)
