"""The steps of the main job, each as the command line runs it: resolve names, check the folder, do the work."""

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
from latentloom.planning.memory_estimate import advice_when_memory_runs_out, measured_seconds
from latentloom.planning.step_timing import TimedStep, time_prior_step, time_tokenizer_step
from latentloom.planning.tokenizer_inputs import TokenizerInputs
from pipelines.across_processes import sample_across_processes
from pipelines.hub import local_folder
from pipelines.latent_generation import LatentGenerationPipeline, to_uint8
from pipelines.saving import INDEX
from stage1_tokenizer.codes.manifest import Contents, View, stored_manifest
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
from stage2_prior.registry import saved_prior
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
TIMED_STEPS = 0.01  # of `minutes`: for how long a step is timed before a run


def load_source(data: str) -> ImageSource:
    return open_source(data_path(data))


def print_classes(source: ImageSource) -> None:
    """Prints how many classes were found, or why there are none, and names those that have no training image."""
    print_once(source.describe_classes())
    if missing := source.classes_without_images:
        named = ", ".join(missing[:20]) + (", …" if len(missing) > 20 else "")
        print_once(
            f"warning: classes without a training image: {named} ({len(missing)} in all); they are sampled only when named"
        )


def load_tokenizer(path: str | Path) -> tuple[Tokenizer, Path]:
    """A tokenizer and its model folder, from a run folder, a model folder, a pipeline or a Hub repository."""
    nested = Path(path).expanduser() / "tokenizer"
    folder = local_folder(nested if nested.is_dir() else path, "config.json", "tokenizer")
    return saved_tokenizer(folder), folder


def run_tokenizer(inputs: TokenizerInputs, minutes: float | None = None) -> Path:
    """Trains a tokenizer, or goes on; returns its model folder."""
    check_minutes(minutes)
    config, model = inputs.config, inputs.model

    def time_step(changed: TokenizerTraining) -> TimedStep:
        return time_tokenizer_step(changed, model)

    if minutes is not None and config.model.learns:
        config = bounded(config, minutes, time_step)
    folder = config.output / "model"
    samples_alone = config.model.samples_alone
    with output_lock(config.output):
        done = check_run_folder(config, "tokenizer", inputs.source.train.fingerprint())
        if done is not None and (not samples_alone or (config.output / "pipeline" / INDEX).exists()):
            print_once(f"{config.output} has finished its {done} steps; give a larger --max-steps to go on")
            return folder
        perceptual = perceptual_loss(config.perceptual)
        perceptual = perceptual and perceptual.to(accelerated_device())
        with advice_when_memory_runs_out(config, time_step):
            train, validation = inputs.images.train, inputs.images.validation
            train.report_skipped()
            train_tokenizer(config, model, train, validation, perceptual)
        if is_main_process():
            if samples_alone:
                save_generator(folder, config)
            mark_finished(config.output)
        wait_for_everyone()
    return folder


def save_generator(folder: Path, config: TokenizerTraining) -> None:
    """Writes the pipeline of a tokenizer whose latents come from N(0, I): it samples without a stage two."""
    tokenizer = saved_tokenizer(folder)
    pipeline = LatentGenerationPipeline(tokenizer, StandardNormalPrior.for_spec(tokenizer.latent_spec()))
    generator = torch.Generator().manual_seed(config.seed)
    pipeline.set_progress_bar_config(disable=True)
    drawn = image_grid(to_uint8(pipeline.sample_pixels(torch.full((64,), -1), generator)), PREVIEW_COLUMNS)
    pipeline.save_pretrained(config.output / "pipeline", samples=drawn)


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
    """Writes the code cache of `source`; returns its folder."""
    with main_process_first():
        if not is_main_process():
            return output
        model, folder = load_tokenizer(tokenizer)
        model.to(accelerated_device())
        any_prior = model.codebook_size is not None and degradation == "none"
        with output_lock(output):
            remove_incomplete(output)
            return write_code_cache(
                model,
                folder,
                source,
                output,
                contents=contents or stored_manifest(output).get("contents") or ("both" if any_prior else "latents"),
                views=views,
                degradation=degradation,
                batch_size=batch_size,
                images=images,
            )


def run_prior(config: PriorTraining, minutes: float | None = None) -> Path:
    """Trains a prior on its code cache, or goes on, and writes the whole pipeline; returns the pipeline's folder."""
    check_minutes(minutes)
    codes = CodeCache(config.codes)
    codes.verify()

    def time_step(changed: PriorTraining) -> TimedStep:
        return time_prior_step(changed, codes.spec, len(codes.label_names or ()))

    if minutes is not None:
        config = bounded(config, minutes, time_step)
    folder = config.output / "pipeline"
    with output_lock(config.output):
        if (done := check_run_folder(config, "prior", codes.fingerprint)) is not None and (folder / INDEX).exists():
            print_once(f"{config.output} has finished its {done} steps; give a larger --max-steps to go on")
            return folder
        train_and_save_pipeline(config, codes, folder, time_step)
    return folder


def train_and_save_pipeline(
    config: PriorTraining, codes: CodeCache, folder: Path, time_step: Callable[[PriorTraining], TimedStep]
) -> None:
    tokenizer = saved_tokenizer(codes.tokenizer_folder)

    def preview(prior: Prior, path: Path) -> None:
        tokenizer.to(prior.device)
        pipeline = LatentGenerationPipeline(tokenizer, prior, codes.label_names, config.sampling, codes.trained_classes)
        drawn = sheet_of(pipeline, codes, config.seed)
        if is_main_process():
            save_image(drawn, path)

    with advice_when_memory_runs_out(config, time_step):
        model = train_prior(config, codes, preview)
    prior = saved_prior(model)
    pipeline = LatentGenerationPipeline(
        tokenizer.cpu(), prior, codes.label_names, config.sampling, codes.trained_classes
    )
    preview_of_these = config.output / "samples" / f"step_{newest_step(config.output):06d}.png"
    drawn = preview_of_these.exists()
    samples = PIL.Image.open(preview_of_these) if drawn else sheet_of(pipeline, codes, config.seed)
    with main_process_first():
        if is_main_process():
            pipeline.save_pretrained(folder, samples=samples)
            mark_finished(config.output)


def sheet_of(pipeline: LatentGenerationPipeline, codes: CodeCache, seed: int) -> PIL.Image.Image:
    """Samples; of a prior that restores rows of degraded pictures of the validation split, restored, and as they were."""
    if not pipeline.prior.is_restoration:
        return sample_grid(pipeline, seed)
    split = codes.validation
    rows = np.arange(min(2 * PREVIEW_COLUMNS, len(split)))
    labels = split.labels(rows) if pipeline.prior.config.num_classes else torch.full((len(rows),), -1)
    given, wanted = split.latents(rows, "degraded"), split.latents(rows)
    pipeline.set_progress_bar_config(disable=True)
    restored = pipeline.sample_pixels(
        labels, torch.Generator().manual_seed(seed), known=KnownCodes.for_restoration(given)
    )
    pipeline.set_progress_bar_config(disable=None)
    pictures = [to_uint8(x).split(PREVIEW_COLUMNS) for x in (pipeline.decode(given), restored, pipeline.decode(wanted))]
    sheet = torch.cat([part for row in zip(*pictures, strict=True) for part in row])
    return image_grid(sheet, PREVIEW_COLUMNS, ["given", "restored", "original"] * len(pictures[0]))


def sample_grid(pipeline: LatentGenerationPipeline, seed: int, columns: int = PREVIEW_COLUMNS) -> PIL.Image.Image:
    """A labelled sheet, one row for each of at most ten classes, at a fixed seed; all processes draw it together."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    classes = list(pipeline.trained_classes[:PREVIEW_ROWS]) or None
    labels = torch.tensor(classes or [-1] * 4).repeat_interleave(columns)
    pictures = sample_across_processes(pipeline, labels, generator)
    pipeline.set_progress_bar_config(disable=None)
    names = [pipeline.label_names[i] for i in classes] if classes and pipeline.label_names else None
    return image_grid(pictures, columns, names)


def bounded(config: Training, minutes: float, time_step: Callable[[Training], TimedStep]) -> Training:
    """`config` with as many steps as fit into `minutes` on this machine; a run that has begun keeps the steps it has."""
    if (steps := stored_steps(config)) is None:
        seconds = measured_seconds(config, time_step, at_least=TIMED_STEPS * 60 * minutes)
        measured = [max(1, int(60 * minutes / seconds))]
        broadcast_object_list(measured)  # processes measure different times, and must take as many steps
        steps = measured[0]
        print_once(
            f"{steps} steps of {config.batch_size} images, {seconds:.3g} s each, fit into {minutes:.2g} minutes: {config.output}"
        )
    return dataclasses.replace(config, max_steps=steps)


def stored_steps(config: RunConfig) -> int | None:
    """The steps that a run has set out to do; none before it has begun."""
    held = stored_configuration(config.output, config.migration)
    return None if held is None else held["max_steps"]
