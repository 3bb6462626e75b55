"""How long a training step takes on this machine: measured on random data before a run, to say or to bound its time."""

import statistics
import time
from collections.abc import Callable

import torch

from stage1_tokenizer.discriminator import PatchDiscriminator
from stage1_tokenizer.latent_spec import LatentSpec
from stage1_tokenizer.losses import discriminator_hinge, generator_hinge, reconstruction_terms
from stage1_tokenizer.perceptual import perceptual_loss
from stage1_tokenizer.train import sum_weighted
from stage1_tokenizer.training_config import TokenizerTraining
from stage1_tokenizer.vqgan import VQGAN, VQGANConfig
from stage2_prior.autoregressive.model import AutoregressivePrior
from stage2_prior.training_config import PriorTraining
from training_harness.optimization import build_optimizer
from training_harness.processes import accelerated_device

WARM_UP, MEASURED = 3, 7


def median_seconds(step: Callable[[], object]) -> float:
    times = []
    for i in range(WARM_UP + MEASURED):
        begin = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i >= WARM_UP:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def tokenizer_seconds_per_step(config: TokenizerTraining, model_config: VQGANConfig) -> float:
    """With the perceptual loss, and the discriminator at work where the recipe has one: the slower part of the run."""
    device = accelerated_device()
    perceptual = perceptual_loss(config.perceptual)
    perceptual = perceptual and perceptual.to(device)
    model = VQGAN(model_config).to(device, memory_format=torch.channels_last).train()
    optimizer = build_optimizer(model, config.optimizer)
    adversarial = config.adversarial
    critic = PatchDiscriminator(model_config.image_channels, adversarial.channels, adversarial.layers).to(device)
    images = torch.rand(config.batch_size, model_config.image_channels, *model_config.image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        output = model(images)
        loss = sum_weighted(reconstruction_terms(output.reconstruction, images, perceptual), config.reconstruction)
        loss = loss + sum(output.losses.values())
        if adversarial.weight > 0:
            loss = loss + generator_hinge(critic(output.reconstruction))
            real, fake = critic(torch.cat([images, output.reconstruction.detach()])).chunk(2)
            discriminator_hinge(real, fake).backward()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return config.accumulation_steps * median_seconds(step)


def prior_seconds_per_step(config: PriorTraining, spec: LatentSpec, num_classes: int) -> float:
    device = accelerated_device()
    prior = AutoregressivePrior(config.model.for_spec(spec, num_classes)).to(device).train()
    optimizer = build_optimizer(prior, config.optimizer)
    codes = torch.randint(spec.codebook_size or 1, (config.batch_size, spec.height, spec.width), device=device)
    labels = torch.full((config.batch_size,), -1, device=device)

    def step() -> None:
        prior(codes, labels).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return config.accumulation_steps * median_seconds(step)
