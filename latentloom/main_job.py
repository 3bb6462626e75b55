"""The main job: both stages, then samples, pictures and figures, in one folder.

DIR/tokenizer/  codes/  prior/  pipeline/   samples.png  reconstructions.png  curves.png  metrics.json
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from latentloom.curves import draw_curves
from latentloom.embedded import FASHION_MNIST, judge_path
from latentloom.stages import run_prior, run_tokenize, run_tokenizer
from pipelines.evaluation import (
    POOLED_PIXELS,
    FeatureExtractor,
    balanced_samples,
    evaluate_samples,
    evaluate_tokenizer,
    judge_features,
    reconstructions,
)
from pipelines.judge import Judge
from pipelines.latent_generation import LatentGenerationPipeline, accelerated_device
from stage1_tokenizer.pictures import before_and_after, image_grid, save_picture
from stage1_tokenizer.pixels import Pixels
from stage1_tokenizer.sources import ImageSource
from stage1_tokenizer.training_config import TokenizerTraining
from stage2_prior.training_config import PriorTraining
from training_harness.errors import UserError
from training_harness.files import write_json
from training_harness.run import newest_step

# Shares of --minutes; the rest goes to reading, tokenizing, sampling and evaluating.
TOKENIZER_SHARE, PRIOR_SHARE = 0.42, 0.42
GRID_COLUMNS, GRID_ROWS = 10, 10


def run_main_job(
    output: Path,
    source: ImageSource,
    tokenizer: TokenizerTraining,
    prior: PriorTraining,
    *,
    minutes: float | None = None,
    num_images: int = 2000,
) -> dict[str, Any]:
    """Trains what is not trained yet, and writes pictures and `metrics.json`; returns the figures.

    `tokenizer` and `prior` write to `output`/tokenizer and `output`/prior.
    """
    if output.exists() and any(output.iterdir()) and not (output / "tokenizer").exists():
        raise UserError(f"{output} is not empty and holds no run of this command; choose another --output")
    phases: dict[str, dict[str, float]] = {}
    begin = time.perf_counter()
    first_steps = newest_step(tokenizer.output), newest_step(prior.output)  # of a run that goes on
    with timed(phases, "train_tokenizer") as phase:
        run_tokenizer(tokenizer, source, None if minutes is None else minutes * TOKENIZER_SHARE)
        phase["images"] = (newest_step(tokenizer.output) - first_steps[0]) * tokenizer.batch_size
    with timed(phases, "tokenize") as phase:
        run_tokenize(tokenizer.output, source, prior.codes)
        phase["images"] = len(source.train) + len(source.validation)
    with timed(phases, "train_prior") as phase:
        folder = run_prior(prior, None if minutes is None else minutes * PRIOR_SHARE)
        phase["images"] = (newest_step(prior.output) - first_steps[1]) * prior.batch_size
    pipeline = LatentGenerationPipeline.from_pretrained(folder).to(accelerated_device())
    figures, samples = write_results(output, source, pipeline, prior.seed, num_images, phases)
    metrics = figures | {
        "seconds": round(time.perf_counter() - begin, 1),
        "phases": phases,
        "seed": prior.seed,
        "data": source.name,
        "versions": {name: version(name) for name in ("latentloom", "torch", "transformers", "accelerate")},
        "machine": {"device": str(accelerated_device()), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }
    write_json(output / "metrics.json", metrics)
    pipeline.to("cpu").save_pretrained(output / "pipeline", metrics=metrics, samples=samples)
    return metrics


def write_results(
    output: Path,
    source: ImageSource,
    pipeline: LatentGenerationPipeline,
    seed: int,
    num_images: int,
    phases: dict[str, dict[str, float]],
) -> tuple[dict[str, Any], Image]:
    """Samples, the three pictures, and the figures on the source's held-out images."""
    processor = pipeline.tokenizer.config.image_processor
    held_out = Pixels(source.held_out, processor)
    extractor = extractor_for(source)
    pipeline.set_progress_bar_config(disable=None, desc="sample")
    with timed(phases, "sample") as phase:
        images, labels = balanced_samples(pipeline, num_images, seed)
        phase["images"] = len(images)
    with timed(phases, "evaluate") as phase:
        originals, rebuilt, _ = reconstructions(pipeline.tokenizer, held_out)
        figures = evaluate_tokenizer(pipeline.tokenizer, held_out, extractor)
        figures |= evaluate_samples(images, labels, originals, extractor)
        phase["images"] = len(images) + len(originals)
    save_picture(before_and_after(originals[:20], rebuilt[:20]), output / "reconstructions.png")
    samples = first_of_each_class(pipeline, images)
    save_picture(samples, output / "samples.png")
    tokenizer_log, prior_log = (output / stage / "metrics.jsonl" for stage in ("tokenizer", "prior"))
    draw_curves(tokenizer_log, prior_log, pipeline.tokenizer.config.codebook_size, output / "curves.png")
    figures |= {
        "num_images": len(images),
        "num_reference_images": len(originals),
        "features": extractor.name,
        "sampling": vars(pipeline.sampling),
    }
    return figures, samples


def first_of_each_class(pipeline: LatentGenerationPipeline, images: Tensor) -> Image:
    """A labelled sheet, a row a class, of images that come class by class."""
    classes = max(1, pipeline.prior.config.num_classes)
    per_class = len(images) // classes
    rows, columns = min(GRID_ROWS, classes), min(GRID_COLUMNS, per_class)
    if classes == 1:  # no rows of their own: a square
        return image_grid(images[: GRID_ROWS * columns], columns)
    shown = torch.cat([images[row * per_class : row * per_class + columns] for row in range(rows)])
    return image_grid(shown, columns, pipeline.label_names[:rows] if pipeline.label_names else None)


def extractor_for(source: ImageSource) -> FeatureExtractor:
    """The judge for the set that it was trained beside, pooled pixels for any other."""
    if source.name == FASHION_MNIST:
        return judge_features(Judge.from_pretrained(judge_path()))
    return POOLED_PIXELS


@contextmanager
def timed(phases: dict[str, dict[str, float]], name: str) -> Iterator[dict[str, float]]:
    """Notes the seconds of a phase, and its rate once the block has said how many images it worked on."""
    begin = time.perf_counter()
    phase: dict[str, float] = {}
    yield phase
    seconds = time.perf_counter() - begin
    phases[name] = {"seconds": round(seconds, 1)} | phase
    phases[name]["images_per_second"] = round(phase["images"] / seconds, 1)


def summary(output: Path, metrics: dict[str, Any]) -> str:
    """What the command closes with: where things are, the figures, what to do next."""
    folder = os.path.relpath(output)
    agreement = metrics["class_agreement"]
    lines = [
        "",
        f"pictures  {folder}/samples.png  {folder}/reconstructions.png  {folder}/curves.png",
        f"pipeline  {folder}/pipeline     all figures: {folder}/metrics.json",
        "",
        f"  reconstruction   PSNR {metrics['psnr']:.2f} dB, {metrics['codes_used']} codes used, "
        f"perplexity {metrics['perplexity']:.0f} ({metrics['num_reference_images']} held-out images)",
        f"  samples          Fréchet distance {metrics['frechet']:.3g}, recall {metrics['recall']:.3f} "
        f"({metrics['num_images']} images, features: {metrics['features']})",
        *([f"  class agreement  {agreement:.1%} by a classifier that no generator has seen"] if agreement else []),
        f"  time             {metrics['seconds']:.0f} s: "
        + ", ".join(f"{name.replace('_', ' ')} {phase['seconds']:.0f}" for name, phase in metrics["phases"].items()),
        "",
        "next:",
        "  latentloom train --data ./my_images --output runs/mine",
        f"  latentloom sample --pipeline {folder}/pipeline --num-images 64 --output more_samples",
        f"  latentloom push --pipeline {folder}/pipeline --repo-id me/my-generator",
    ]
    return "\n".join(lines)
