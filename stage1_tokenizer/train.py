"""Stage one: trains a tokenizer on a source of images."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from stage1_tokenizer.data.image_grids import reconstruction_grid, save_image
from stage1_tokenizer.data.image_loader import ImageLoader, images_at_once
from stage1_tokenizer.health import Health
from stage1_tokenizer.losses.adversarial import (
    LeCAM,
    adaptive_weight,
    allow_compiling,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)
from stage1_tokenizer.losses.reconstruction import PerceptualLoss, reconstruction_terms, sum_weighted
from stage1_tokenizer.metrics import CodeUsage, psnr
from stage1_tokenizer.model_card import tokenizer_card
from stage1_tokenizer.networks.discriminator import PatchDiscriminator
from stage1_tokenizer.registry import new_tokenizer
from stage1_tokenizer.tokenizer import Tokenizer, TokenizerConfig
from stage1_tokenizer.training_config import TokenizerTraining
from stage1_tokenizer.vqgan import VQGANModel
from training_harness.batch_order import BatchOrder
from training_harness.ema import EMA
from training_harness.errors import UserError
from training_harness.files import update_folder
from training_harness.model_cards import write_card
from training_harness.optimization import build_optimizer, set_learning_rate
from training_harness.processes import mean_over_processes, process_indices
from training_harness.run import Run

PREVIEW_IMAGES, VALIDATION_IMAGES = 20, 1_000
STATISTICS_IMAGES = 2_000  # each gives h · w positions: more than enough for two numbers a channel


def train_tokenizer(
    config: TokenizerTraining,
    model_config: TokenizerConfig,
    train: ImageLoader,
    validation: ImageLoader,
    perceptual: PerceptualLoss | None = None,
    on_validation: Callable[[int, float], None] | None = None,
) -> Path:
    """Trains, or goes on training, in `config.output`; returns the folder of the finished model.

    Args:
        train, validation: pictures of the content size that `model_config` states.
        perceptual: a distance between (B, C, H, W) batches in [-1, 1], added with `reconstruction.perceptual`.
        on_validation: called with each step that is validated and −PSNR; what it raises ends the run.
    """
    run = Run(config, train.split.fingerprint())
    if run.is_sharded:
        raise UserError(
            "the processes were launched with FSDP, and a tokenizer trains under DDP: each process holds all of it; launch "
            "without it, as scripts/accelerate/8_gpus.yaml does"
        )
    run.on_validation = on_validation or run.on_validation
    accelerator, adversarial, weights = run.accelerator, config.adversarial, config.reconstruction
    processor = model_config.image_processor
    tokenizer = new_tokenizer(model_config)
    if not config.model.learns:
        return save_untrained(run, tokenizer, train, validation)
    tokenizer.to(memory_format=torch.channels_last)  # before DDP lays out its buckets
    discriminator = PatchDiscriminator(model_config.image_channels, adversarial.channels, adversarial.layers)
    if config.gradient_checkpointing:
        tokenizer.enable_gradient_checkpointing()
    if config.compile and adversarial.weight > 0:
        allow_compiling(discriminator, adversarial)
    optimizer = build_optimizer(tokenizer, config.optimizer)
    discriminator_optimizer = torch.optim.Adam(
        discriminator.parameters(), lr=adversarial.learning_rate, betas=(0.5, 0.9)
    )
    model, critic, optimizer, discriminator_optimizer = accelerator.prepare(
        tokenizer, discriminator, optimizer, discriminator_optimizer
    )
    tokenizer, discriminator = run.unwrap(model), run.unwrap(critic)
    ema = EMA(tokenizer, config.ema)
    usage, lecam, health = CodeUsage(tokenizer.codebook_size, tokenizer.levels), LeCAM(), Health()
    run.track(
        model=model,
        ema=ema,
        optimizer=optimizer,
        discriminator=critic,
        discriminator_optimizer=discriminator_optimizer,
        usage=usage,
        lecam=lecam,
        health=health,
    )
    order = BatchOrder(len(train), config.batch_size, config.seed, accelerator.process_index, accelerator.num_processes)
    batches = train.random_batches(order, run.step * config.accumulation_steps)
    run.source_ids = lambda step: train.source_ids(order.step_indices(step, config.accumulation_steps))

    for step in run.steps(config.batch_size, "tokenizer"):
        set_learning_rate(optimizer, config.schedule.at(step, config.max_steps))
        share = adversarial.share(step, config.max_steps)
        for _ in range(config.accumulation_steps):
            pixel_values = processor.preprocess(next(batches).to(accelerator.device))
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
            with accelerator.accumulate(model, critic):
                output = model(pixel_values)
                terms = reconstruction_terms(output.reconstruction, pixel_values, weights, perceptual)
                reconstruction = sum_weighted(terms, weights)
                loss = reconstruction + sum_weighted(output.losses, weights) if output.losses else reconstruction
                terms |= output.losses
                if share > 0:
                    discriminator.requires_grad_(False)  # the generator's loss leaves no gradient there
                    terms["generator"] = generator_loss(adversarial.loss, discriminator(output.reconstruction))
                    discriminator.requires_grad_(True)
                    terms["adaptive_weight"] = (
                        adaptive_weight(reconstruction, terms["generator"], tokenizer.decoder.last_layer)
                        if adversarial.adaptive
                        else torch.ones_like(loss)
                    )
                    loss = loss + share * adversarial.weight * terms["adaptive_weight"] * terms["generator"]
                accelerator.backward(loss)
                finite = run.optimizer_step(step, optimizer, model, terms, config.optimizer.max_grad_norm)

                if not finite:  # the batches before of a step that is left out do not count either
                    discriminator_optimizer.zero_grad()
                elif adversarial.discriminating(step, config.max_steps):
                    pair = torch.cat([pixel_values, output.reconstruction.detach()])  # one forward: DDP hooks it once
                    real_logits, fake_logits = critic(pair.requires_grad_(adversarial.r1 > 0)).chunk(2)
                    terms |= {"logits_real": real_logits.mean(), "logits_fake": fake_logits.mean()}
                    judged = {"discriminator": discriminator_loss(adversarial.loss, real_logits, fake_logits)}
                    loss = judged["discriminator"]
                    if adversarial.lecam > 0:
                        judged["lecam"] = lecam.penalty(real_logits, fake_logits)
                        loss = loss + adversarial.lecam * judged["lecam"]
                    if adversarial.r1 > 0:
                        judged["r1"] = r1_penalty(real_logits, pair)
                        loss = loss + adversarial.r1 * judged["r1"]
                    health.record_discriminator(judged["discriminator"])
                    terms |= judged
                    accelerator.backward(loss)
                    run.optimizer_step(step, discriminator_optimizer, critic, judged, 0.0, name="discriminator")
            if output.indices is not None:
                usage.count(output.indices)
        ema.update(step)
        run.log(step, terms | {"learning_rate": optimizer.param_groups[0]["lr"]})
        if run.is_due(step, config.sample_every):
            found, choices, used = validation_psnr(ema.model, validation), usage.choices, usage.since_last()
            run.log_row(step, {"validation_psnr": found} | used)
            quantizer = config.model.quantizer if isinstance(config.model, VQGANModel) else None
            for about, text in health.warnings(found, used, choices, tokenizer.codebook_size, quantizer, share).items():
                run.warn(step, about, text)
            run.record_validation(step, -found)
            if accelerator.is_main_process:
                preview(ema.model, validation, run.samples_path(step))
            run.log_samples(step)
        if run.is_checkpoint_due(step):
            run.checkpoint(step)
    return export(run, ema.model, train)


@torch.no_grad()
def preview(tokenizer: Tokenizer, validation: ImageLoader, path: Path) -> None:
    """Saves originals over reconstructions."""
    images = validation[range(min(PREVIEW_IMAGES, len(validation)))]
    save_image(reconstruction_grid(images, rebuilt(tokenizer, images)), path)


def rebuilt(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """uint8 (B, C, h, w) after the round trip, on the CPU."""
    processor = tokenizer.config.image_processor
    return processor.postprocess(tokenizer(processor.preprocess(images.to(tokenizer.device))).reconstruction).cpu()


@torch.no_grad()
def validation_psnr(tokenizer: Tokenizer, validation: ImageLoader) -> float:
    """Mean over at most 1,000 images, of which each process takes its share."""
    positions, total = process_indices(min(VALIDATION_IMAGES, len(validation))), 0.0
    size = images_at_once(tokenizer.config.image_size)
    for start in range(0, len(positions), size):
        images = validation[positions[start : start + size]]
        total += float(psnr(rebuilt(tokenizer, images), images).sum())
    return mean_over_processes(total, len(positions))


@torch.no_grad()
def measure_latents(tokenizer: Tokenizer, pixels: ImageLoader) -> None:
    """Stores mean and standard deviation by channel of the raw latents, over at most 2,000 images."""
    processor, device = tokenizer.config.image_processor, tokenizer.device
    count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    stride = -(-len(pixels) // STATISTICS_IMAGES)  # evenly: folders come class by class
    rows = list(range(0, len(pixels), stride))
    size = images_at_once(tokenizer.config.image_size)
    for start in range(0, len(rows), size):
        images = pixels[rows[start : start + size]]
        latents, squared = tokenizer.latent_moments(processor.preprocess(images.to(device)))
        count += latents.numel() // latents.shape[1]
        total = total + latents.cpu().double().sum((0, 2, 3))  # in this order: MPS knows no float64
        squares = squares + squared.cpu().double().sum((0, 2, 3))
    mean = total / count
    tokenizer.config.latent_mean = mean.tolist()
    tokenizer.config.latent_std = (squares / count - mean.square()).clamp(min=1e-12).sqrt().tolist()


def save_untrained(run: Run, tokenizer: Tokenizer, train: ImageLoader, validation: ImageLoader) -> Path:
    """Finishes the run of a tokenizer that has nothing to learn: its latents are measured, and that is all."""
    run.track(model=tokenizer)
    step = run.step = run.config.max_steps
    run.log_row(step, {"validation_psnr": validation_psnr(tokenizer, validation)})
    run.checkpoint(step)
    return export(run, tokenizer, train)


def export(run: Run, tokenizer: Tokenizer, train: ImageLoader) -> Path:
    """Writes `model/`: the averaged weights with the latents' statistics and the tokenizer's id."""
    folder = run.folder / "model"
    if run.accelerator.is_main_process:
        measure_latents(tokenizer, train)
        tokenizer.config.tokenizer_id = None
        tokenizer.config.tokenizer_id = tokenizer.compute_id()
        with update_folder(folder, last="config.json") as beside:
            tokenizer.save_pretrained(beside)
            write_card(folder, beside, tokenizer_card(tokenizer, run.log_file.path))
    run.accelerator.wait_for_everyone()
    return folder
