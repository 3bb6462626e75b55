"""The training loop of stage one, which trains a tokenizer on images."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from stage1_tokenizer.data.image_grids import reconstruction_grid, save_image
from stage1_tokenizer.data.image_loader import ImageLoader, inference_batch_size
from stage1_tokenizer.health import Health
from stage1_tokenizer.losses.adversarial import (
    LeCAM,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    prepare_for_compile,
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
STATISTICS_IMAGES = 2_000  # for the latent statistics: each image has h · w positions


def train_tokenizer(
    config: TokenizerTraining,
    model_config: TokenizerConfig,
    train: ImageLoader,
    validation: ImageLoader,
    perceptual: PerceptualLoss | None = None,
    on_validation: Callable[[int, float], None] | None = None,
) -> Path:
    """Train a tokenizer in `config.output`, or resume its training, and return the folder of the model.

    Args:
        train, validation: images with the `content_size` of `model_config`.
        perceptual: distance of two batches (B, C, H, W) in [-1, 1], weighted by `reconstruction.perceptual`.
        on_validation: called with the step and −PSNR in dB at each validation. An exception in it ends the run.

    Raises:   UserError when the processes were launched with FSDP.
    """
    run = Run(config, train.split.fingerprint())
    if run.is_sharded:
        raise UserError(
            "the processes were launched with FSDP; a tokenizer expects DDP. Launch without FSDP, as in "
            "scripts/accelerate/8_gpus.yaml"
        )
    run.on_validation = on_validation or run.on_validation
    accelerator, adversarial, weights = run.accelerator, config.adversarial, config.reconstruction
    processor = model_config.image_processor
    tokenizer = new_tokenizer(model_config)
    if not config.model.is_trainable:
        return save_untrained(run, tokenizer, train, validation)
    tokenizer.to(memory_format=torch.channels_last)  # before DDP allocates its buckets
    discriminator = PatchDiscriminator(model_config.image_channels, adversarial.channels, adversarial.layers)
    if config.gradient_checkpointing:
        tokenizer.enable_gradient_checkpointing()
    if config.compile and adversarial.weight > 0:
        prepare_for_compile(discriminator, adversarial)
    optimizer = build_optimizer(tokenizer, config.optimizer)
    discriminator_optimizer = torch.optim.Adam(
        discriminator.parameters(), lr=adversarial.learning_rate, betas=(0.5, 0.9)
    )
    model, wrapped_discriminator, optimizer, discriminator_optimizer = accelerator.prepare(
        tokenizer, discriminator, optimizer, discriminator_optimizer
    )
    tokenizer, discriminator = run.unwrap(model), run.unwrap(wrapped_discriminator)
    ema = EMA(tokenizer, config.ema)
    usage, lecam, health = CodeUsage(tokenizer.codebook_size, tokenizer.levels), LeCAM(), Health()
    run.track(
        model=model,
        ema=ema,
        optimizer=optimizer,
        discriminator=wrapped_discriminator,
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
        ramp_factor = adversarial.ramp_factor(step, config.max_steps)
        for _ in range(config.accumulation_steps):
            pixel_values = processor.preprocess(next(batches).to(accelerator.device))
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
            with accelerator.accumulate(model, wrapped_discriminator):
                output = model(pixel_values)
                terms = reconstruction_terms(output.reconstruction, pixel_values, weights, perceptual)
                reconstruction_loss = sum_weighted(terms, weights)
                loss = reconstruction_loss
                if output.losses:
                    loss = reconstruction_loss + sum_weighted(output.losses, weights)
                terms |= output.losses
                if ramp_factor > 0:
                    discriminator.requires_grad_(False)  # no gradients from the generator's loss
                    terms["generator"] = generator_loss(adversarial.loss, discriminator(output.reconstruction))
                    discriminator.requires_grad_(True)
                    terms["adaptive_weight"] = (
                        adaptive_weight(reconstruction_loss, terms["generator"], tokenizer.decoder.last_layer)
                        if adversarial.adaptive
                        else torch.ones_like(loss)
                    )
                    loss = loss + ramp_factor * adversarial.weight * terms["adaptive_weight"] * terms["generator"]
                accelerator.backward(loss)
                finite = run.optimizer_step(step, optimizer, model, terms, config.optimizer.max_grad_norm)

                if not finite:  # the whole step is skipped, so drop the gradients of its earlier batches too
                    discriminator_optimizer.zero_grad()
                elif adversarial.trains_discriminator(step, config.max_steps):
                    # Real and fake images in one forward pass: DDP supports one per backward pass.
                    images = torch.cat([pixel_values, output.reconstruction.detach()])
                    logits = wrapped_discriminator(images.requires_grad_(adversarial.r1 > 0))
                    real_logits, fake_logits = logits.chunk(2)
                    terms |= {"logits_real": real_logits.mean(), "logits_fake": fake_logits.mean()}
                    discriminator_terms = {
                        "discriminator": discriminator_loss(adversarial.loss, real_logits, fake_logits)
                    }
                    loss = discriminator_terms["discriminator"]
                    if adversarial.lecam > 0:
                        discriminator_terms["lecam"] = lecam.penalty(real_logits, fake_logits)
                        loss = loss + adversarial.lecam * discriminator_terms["lecam"]
                    if adversarial.r1 > 0:
                        discriminator_terms["r1"] = r1_penalty(real_logits, images)
                        loss = loss + adversarial.r1 * discriminator_terms["r1"]
                    health.record_discriminator_loss(discriminator_terms["discriminator"])
                    terms |= discriminator_terms
                    accelerator.backward(loss)
                    run.optimizer_step(
                        step,
                        discriminator_optimizer,
                        wrapped_discriminator,
                        discriminator_terms,
                        0.0,
                        name="discriminator",
                    )
            if output.indices is not None:
                usage.update(output.indices)
        ema.update(step)
        run.log(step, terms | {"learning_rate": optimizer.param_groups[0]["lr"]})
        if run.is_due(step, config.sample_every):
            validated_psnr = validation_psnr(ema.model, validation)
            assignments, usage_metrics = usage.assignments, usage.compute_and_reset()
            run.log_row(step, {"validation_psnr": validated_psnr} | usage_metrics)
            quantizer = config.model.quantizer if isinstance(config.model, VQGANModel) else None
            warnings = health.new_warnings(
                validated_psnr, usage_metrics, assignments, tokenizer.codebook_size, quantizer, ramp_factor
            )
            for topic, text in warnings.items():
                run.warn(step, topic, text)
            run.record_validation(step, -validated_psnr)
            if accelerator.is_main_process:
                save_preview(ema.model, validation, run.samples_path(step))
            run.log_samples(step)
        if run.is_checkpoint_due(step):
            run.checkpoint(step)
    return export_model(run, ema.model, train)


@torch.no_grad()
def save_preview(tokenizer: Tokenizer, validation: ImageLoader, path: Path) -> None:
    """Save validation images and their reconstructions as one grid."""
    images = validation[range(min(PREVIEW_IMAGES, len(validation)))]
    save_image(reconstruction_grid(images, reconstruct_images(tokenizer, images)), path)


def reconstruct_images(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """Encode and decode uint8 images (B, C, H, W) of the content size, and return uint8 images on the CPU."""
    processor = tokenizer.config.image_processor
    return processor.postprocess(tokenizer(processor.preprocess(images.to(tokenizer.device))).reconstruction).cpu()


@torch.no_grad()
def validation_psnr(tokenizer: Tokenizer, validation: ImageLoader) -> float:
    """Compute the mean PSNR in dB over at most 1,000 validation images, split over the processes."""
    positions, total = process_indices(min(VALIDATION_IMAGES, len(validation))), 0.0
    batch_size = inference_batch_size(tokenizer.config.image_size)
    for start in range(0, len(positions), batch_size):
        images = validation[positions[start : start + batch_size]]
        total += float(psnr(reconstruct_images(tokenizer, images), images).sum())
    return mean_over_processes(total, len(positions))


@torch.no_grad()
def measure_latent_statistics(tokenizer: Tokenizer, train: ImageLoader) -> None:
    """Compute mean and standard deviation of each latent channel over at most 2,000 images, and store them in the config."""
    processor, device = tokenizer.config.image_processor, tokenizer.device
    count, total, total_squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    stride = -(-len(train) // STATISTICS_IMAGES)  # evenly spaced, because folders are sorted by class
    positions = list(range(0, len(train), stride))
    batch_size = inference_batch_size(tokenizer.config.image_size)
    for start in range(0, len(positions), batch_size):
        images = train[positions[start : start + batch_size]]
        latents, squares = tokenizer.latent_moments(processor.preprocess(images.to(device)))
        count += latents.numel() // latents.shape[1]
        total = total + latents.cpu().double().sum((0, 2, 3))  # on the CPU, because MPS has no float64
        total_squares = total_squares + squares.cpu().double().sum((0, 2, 3))
    mean = total / count
    tokenizer.config.latent_mean = mean.tolist()
    tokenizer.config.latent_std = (total_squares / count - mean.square()).clamp(min=1e-12).sqrt().tolist()


def save_untrained(run: Run, tokenizer: Tokenizer, train: ImageLoader, validation: ImageLoader) -> Path:
    """Finish the run of a tokenizer without trainable weights: measure its latent statistics and save it."""
    run.track(model=tokenizer)
    step = run.step = run.config.max_steps
    run.log_row(step, {"validation_psnr": validation_psnr(tokenizer, validation)})
    run.checkpoint(step)
    return export_model(run, tokenizer, train)


def export_model(run: Run, tokenizer: Tokenizer, train: ImageLoader) -> Path:
    """Save the EMA weights with the latent statistics and the tokenizer id to `model/`, and return that folder."""
    folder = run.folder / "model"
    if run.accelerator.is_main_process:
        measure_latent_statistics(tokenizer, train)
        tokenizer.config.tokenizer_id = None
        tokenizer.config.tokenizer_id = tokenizer.compute_id()
        with update_folder(folder, last="config.json") as temporary_folder:
            tokenizer.save_pretrained(temporary_folder)
            write_card(folder, temporary_folder, tokenizer_card(tokenizer, run.log_file.path))
    run.accelerator.wait_for_everyone()
    return folder
