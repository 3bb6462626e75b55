"""Run one stage as its command does: resolve the inputs, check the output folder, then train or tokenize."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import PIL.Image
import torch
from accelerate.utils import broadcast_object_list

from latentloom.checks import check_minutes
from latentloom.data.embedded import data_path
from latentloom.planning.memory_estimate import explain_out_of_memory, measure_step_seconds
from latentloom.planning.step_timing import TimedStep, time_prior_step, time_tokenizer_step
from latentloom.planning.tokenizer_inputs import TokenizerInputs
from pipelines.across_processes import sample_across_processes
from pipelines.hub import local_folder
from pipelines.latent_generation import LatentGenerationPipeline, to_uint8
from pipelines.saving import INDEX
from stage1_tokenizer.codes.manifest import Contents, View, find_manifest
from stage1_tokenizer.codes.reader import CodeCache
from stage1_tokenizer.codes.writer import write_code_cache
from stage1_tokenizer.data.degradation import Degradation
from stage1_tokenizer.data.image_grids import image_grid, save_image
from stage1_tokenizer.data.image_loader import LoadedSource
from stage1_tokenizer.data.sources import ImageSource, open_source
from stage1_tokenizer.losses.perceptual import perceptual_loss
from stage1_tokenizer.registry import saved_tokenizer
from stage1_tokenizer.tokenizer import Tokenizer
from stage1_tokenizer.train import train_tokenizer
from stage1_tokenizer.training_config import TokenizerTraining
from stage2_prior.prior import KnownCodes, Prior
from stage2_prior.registry import load_saved_prior
from stage2_prior.standard_normal import StandardNormalPrior
from stage2_prior.train import train_prior
from stage2_prior.training_config import PriorTraining
from training_harness.checkpoints import newest_step
from training_harness.files import remove_incomplete
from training_harness.output_lock import output_lock
from training_harness.processes import (
    accelerated_device,
    is_main_process,
    main_process_first,
    print_once,
    wait_for_everyone,
)
from training_harness.run_config import RunConfig
from training_harness.run_folder import check_run_folder, stored_configuration
from training_harness.run_metadata import mark_finished

Training = TypeVar("Training", bound=RunConfig)
PREVIEW_ROWS, PREVIEW_COLUMNS = 10, 8
TIMING_SHARE = 0.01  # share of --minutes that is spent on timing steps before a run


def load_source(data: str) -> ImageSource:
    """Open the images that `--data` names: a path, a Hub data set or an embedded set."""
    return open_source(data_path(data))


def print_classes(source: ImageSource) -> None:
    """Print the number of classes, or why there are none, and warn about classes without a training image."""
    print_once(source.describe_classes())
    if empty_classes := source.classes_without_images:
        names = ", ".join(empty_classes[:20]) + (", …" if len(empty_classes) > 20 else "")
        print_once(
            f"warning: {len(empty_classes)} classes have no training image: {names}. "
            "They are sampled only when you name them with --classes."
        )


def load_tokenizer(path: str | Path) -> tuple[Tokenizer, Path]:
    """Load a tokenizer from a run folder, a model folder, a pipeline or a Hub repository.

    Returns:
        The tokenizer and its model folder.
    """
    nested = Path(path).expanduser() / "tokenizer"
    folder = local_folder(nested if nested.is_dir() else path, "config.json", "tokenizer")
    return saved_tokenizer(folder), folder


def run_tokenizer(inputs: TokenizerInputs, minutes: float | None = None) -> Path:
    """Train a tokenizer, or resume its run; return its model folder.

    Args:
        minutes: limits the steps of a new run to what fits into this time.
    """
    check_minutes(minutes)
    config, model = inputs.config, inputs.model

    def build_step(step_config: TokenizerTraining) -> TimedStep:
        return time_tokenizer_step(step_config, model)

    if minutes is not None and config.model.is_trainable:
        config = limit_steps(config, minutes, build_step)
    folder = config.output / "model"
    samples_without_prior = config.model.samples_without_prior
    with output_lock(config.output):
        finished_steps = check_run_folder(config, "tokenizer", inputs.source.train.fingerprint())
        if finished_steps is not None and (not samples_without_prior or (config.output / "pipeline" / INDEX).exists()):
            print_once(f"{config.output} has finished its {finished_steps} steps; pass a larger --max-steps to go on")
            return folder
        perceptual = perceptual_loss(config.perceptual)
        perceptual = perceptual and perceptual.to(accelerated_device())
        with explain_out_of_memory(config, build_step):
            train, validation = inputs.images.train, inputs.images.validation
            train.report_skipped()
            train_tokenizer(config, model, train, validation, perceptual)
        if is_main_process():
            if samples_without_prior:
                save_standard_normal_pipeline(folder, config)
            mark_finished(config.output)
        wait_for_everyone()
    return folder


def save_standard_normal_pipeline(folder: Path, config: TokenizerTraining) -> None:
    """Save a pipeline that samples latents from N(0, I): this tokenizer needs no stage two."""
    tokenizer = saved_tokenizer(folder)
    pipeline = LatentGenerationPipeline(tokenizer, StandardNormalPrior.for_spec(tokenizer.latent_spec()))
    generator = torch.Generator().manual_seed(config.seed)
    pipeline.set_progress_bar_config(disable=True)
    samples = image_grid(to_uint8(pipeline.sample_pixels(torch.full((64,), -1), generator)), PREVIEW_COLUMNS)
    pipeline.save_pretrained(config.output / "pipeline", samples=samples)


def run_tokenize(
    tokenizer: str | Path,
    source: ImageSource,
    output: Path,
    contents: Contents | None = None,
    views: tuple[View, ...] = ("original",),
    degradation: Degradation = "none",
    batch_size: int | None = None,
    images: LoadedSource | None = None,
) -> Path:
    """Write the code cache of `source`, or complete an interrupted one; return its folder.

    Args:
        contents: indices, latents or both. The default is the contents of an existing cache; for a new cache it is both
            when the tokenizer has a codebook and the images are not degraded, and latents otherwise.
        images: the images of `source`, when they are in memory already.
    """
    with main_process_first():
        if not is_main_process():
            return output
        model, folder = load_tokenizer(tokenizer)
        model.to(accelerated_device())
        has_indices = model.codebook_size is not None and degradation == "none"
        with output_lock(output):
            remove_incomplete(output)
            return write_code_cache(
                model,
                folder,
                source,
                output,
                contents=contents or find_manifest(output).get("contents") or ("both" if has_indices else "latents"),
                views=views,
                degradation=degradation,
                batch_size=batch_size,
                images=images,
            )


def run_prior(config: PriorTraining, minutes: float | None = None) -> Path:
    """Train a prior on its code cache, or resume its run, and save the pipeline; return the pipeline folder.

    Args:
        minutes: limits the steps of a new run to what fits into this time.
    """
    check_minutes(minutes)
    codes = CodeCache(config.codes)
    codes.verify()

    def build_step(step_config: PriorTraining) -> TimedStep:
        return time_prior_step(step_config, codes.spec, len(codes.label_names or ()))

    if minutes is not None:
        config = limit_steps(config, minutes, build_step)
    folder = config.output / "pipeline"
    with output_lock(config.output):
        finished_steps = check_run_folder(config, "prior", codes.fingerprint)
        if finished_steps is not None and (folder / INDEX).exists():
            print_once(f"{config.output} has finished its {finished_steps} steps; pass a larger --max-steps to go on")
            return folder
        train_and_save_pipeline(config, codes, folder, build_step)
    return folder


def train_and_save_pipeline(
    config: PriorTraining, codes: CodeCache, folder: Path, build_step: Callable[[PriorTraining], TimedStep]
) -> None:
    """Train the prior with previews, then save it with its tokenizer as a pipeline in `folder`."""
    tokenizer = saved_tokenizer(codes.tokenizer_folder)

    def preview(prior: Prior, path: Path) -> None:
        tokenizer.to(prior.device)
        pipeline = LatentGenerationPipeline(tokenizer, prior, codes.label_names, config.sampling, codes.trained_classes)
        grid = build_preview_grid(pipeline, codes, config.seed)
        if is_main_process():
            save_image(grid, path)

    with explain_out_of_memory(config, build_step):
        model_folder = train_prior(config, codes, preview)
    prior = load_saved_prior(model_folder)
    pipeline = LatentGenerationPipeline(
        tokenizer.cpu(), prior, codes.label_names, config.sampling, codes.trained_classes
    )
    last_preview = config.output / "samples" / f"step_{newest_step(config.output):06d}.png"
    samples = (
        PIL.Image.open(last_preview) if last_preview.exists() else build_preview_grid(pipeline, codes, config.seed)
    )
    with main_process_first():
        if is_main_process():
            pipeline.save_pretrained(folder, samples=samples)
            mark_finished(config.output)


def build_preview_grid(pipeline: LatentGenerationPipeline, codes: CodeCache, seed: int) -> PIL.Image.Image:
    """Generate samples or, with a restoration prior, restore images of the validation split.

    A restored grid repeats three rows: the degraded images, the restored images and the originals.
    """
    if not pipeline.prior.is_restoration:
        return generate_sample_grid(pipeline, seed)
    split = codes.validation
    positions = np.arange(min(2 * PREVIEW_COLUMNS, len(split)))
    labels = split.labels(positions) if pipeline.prior.config.num_classes else torch.full((len(positions),), -1)
    degraded, original = split.latents(positions, "degraded"), split.latents(positions)
    pipeline.set_progress_bar_config(disable=True)
    restored = pipeline.sample_pixels(
        labels, torch.Generator().manual_seed(seed), known=KnownCodes.for_restoration(degraded)
    )
    pipeline.set_progress_bar_config(disable=None)
    rows = [
        to_uint8(pixels).split(PREVIEW_COLUMNS)
        for pixels in (pipeline.decode(degraded), restored, pipeline.decode(original))
    ]
    images = torch.cat([row for group in zip(*rows, strict=True) for row in group])
    return image_grid(images, PREVIEW_COLUMNS, ["degraded", "restored", "original"] * len(rows[0]))


def generate_sample_grid(
    pipeline: LatentGenerationPipeline, seed: int, columns: int = PREVIEW_COLUMNS
) -> PIL.Image.Image:
    """Generate a labelled grid with one row for each of at most ten classes.

    All processes generate it together; the seed fixes the images.
    """
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    classes = list(pipeline.trained_classes[:PREVIEW_ROWS]) or None
    labels = torch.tensor(classes or [-1] * 4).repeat_interleave(columns)
    images = sample_across_processes(pipeline, labels, generator)
    pipeline.set_progress_bar_config(disable=None)
    names = [pipeline.label_names[i] for i in classes] if classes and pipeline.label_names else None
    return image_grid(images, columns, names)


def limit_steps(config: Training, minutes: float, build_step: Callable[[Training], TimedStep]) -> Training:
    """Set `max_steps` to the number of steps that fit into `minutes` on this machine.

    A run that has begun keeps its number of steps.
    """
    if (steps := stored_steps(config)) is None:
        seconds = measure_step_seconds(config, build_step, at_least=TIMING_SHARE * 60 * minutes)
        shared_steps = [max(1, int(60 * minutes / seconds))]
        broadcast_object_list(shared_steps)  # each process measures another time, but all must train the same steps
        steps = shared_steps[0]
        print_once(
            f"{steps} steps of {config.batch_size} images, {seconds:.3g} s each, fit into {minutes:.2g} minutes: {config.output}"
        )
    return dataclasses.replace(config, max_steps=steps)


def stored_steps(config: RunConfig) -> int | None:
    """Return `max_steps` of the run in the output folder, or None when the folder holds no run."""
    stored = stored_configuration(config.output, config.migration)
    return None if stored is None else stored["max_steps"]
