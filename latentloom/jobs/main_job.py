"""The main job: both stages, then samples, pictures and figures, in one folder.

DIR/tokenizer/  codes/  prior/  pipeline/   samples.png  reconstructions.png  curves.png  metrics.json
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from latentloom.jobs.curves import plot_curves
from latentloom.jobs.evaluation import GRID_COLUMNS, GRID_ROWS, extractor_for, features_folder, settings_of, sheet
from latentloom.jobs.stages import load_tokenizer, run_prior, run_tokenize, run_tokenizer, stored_steps
from latentloom.planning.tokenizer_inputs import TokenizerInputs
from pipelines.evaluation.evaluator import Evaluator
from pipelines.evaluation.features import FeatureExtractor
from pipelines.evaluation.pipeline_metrics import balanced_labels, keeping_first, pipeline_metrics, sampled_batches
from pipelines.evaluation.restoration import Restorations
from pipelines.evaluation.tokenizer_metrics import reconstruct
from pipelines.latent_generation import LatentGenerationPipeline
from pipelines.saving import INDEX, check_pipeline_folder
from stage1_tokenizer.codes.manifest import Contents, codes_fingerprint, stored_manifest
from stage1_tokenizer.data.image_grids import reconstruction_grid, save_image
from stage1_tokenizer.data.image_loader import LoadedSource
from stage1_tokenizer.registry import new_tokenizer
from stage1_tokenizer.tokenizer import TokenizerConfig
from stage1_tokenizer.training_config import TokenizerTraining
from stage2_prior.training_config import DiffusionTraining, PriorTraining
from training_harness.checkpoints import newest_step
from training_harness.errors import UserError
from training_harness.files import holds_files, write_json
from training_harness.output_lock import output_lock
from training_harness.processes import (
    accelerated_device,
    is_main_process,
    main_process_first,
    print_once,
    wait_for_everyone,
)
from training_harness.run_config import RunConfig
from training_harness.run_folder import check_run_folder

# Shares of --minutes; the rest goes to reading, tokenizing, sampling and evaluating.
TOKENIZER_SHARE, PRIOR_SHARE = 0.42, 0.42


def check_prior(shape: TokenizerConfig, prior: PriorTraining, num_classes: int) -> None:
    """Refuses before anything is trained settings of a prior that do not fit the codes that it will be given."""
    spec = new_tokenizer(shape).latent_spec()
    with torch.device("meta"):
        prior.new_prior(spec, num_classes)


def check_codes(tokenizer: TokenizerTraining, prior: PriorTraining) -> None:
    """Refuses before anything is trained what the prior could not be trained on."""
    model = tokenizer.model
    if model.name == "vqgan" or prior.prior == "diffusion":
        return
    hint = ", or train-tokenizer alone: it samples without a prior" if model.samples_alone else ""
    raise UserError(
        f"the tokenizer {model.name} has no codes and the autoregressive prior is one of codes; expected another tokenizer or "
        f"prior; give --tokenizer-recipe vqgan-f4 or --recipe diffusion-tiny{hint}"
    )


def run_main_job(
    output: Path,
    inputs: TokenizerInputs,
    prior: PriorTraining,
    *,
    minutes: float | None = None,
    num_images: int = 2000,
) -> dict[str, Any]:
    """Trains what is not trained yet, and writes pictures and `metrics.json`; returns the figures.

    The tokenizer and the prior write to `output`/tokenizer and `output`/prior. A finished job is left as it is.
    """
    with output_lock(output):
        return _run_main_job(output, inputs, prior, minutes, num_images)


def _run_main_job(
    output: Path,
    inputs: TokenizerInputs,
    prior: PriorTraining,
    minutes: float | None,
    num_images: int,
) -> dict[str, Any]:
    tokenizer, source = inputs.config, inputs.source
    if holds_files(output) and not (output / "tokenizer").exists():
        raise UserError(f"{output} is not empty and holds no run of this command; choose another --output")
    if (held := finished_metrics(output, inputs, prior, minutes)) is not None:
        done = " and ".join(f"{steps} steps of the {stage}" for stage, steps in held["steps"].items())
        print_once(f"{output} has finished its {done}; give a larger --max-steps to go on, or another --output")
        return held
    check_pipeline_folder(output / "pipeline")
    check_prior(inputs.model, prior, len(source.label_names or ()))
    phases: dict[str, dict[str, float]] = {}
    begin = time.perf_counter()
    first_steps = newest_step(tokenizer.output), newest_step(prior.output)  # of a run that goes on
    with timed(phases, "train_tokenizer") as phase:
        run_tokenizer(inputs, None if minutes is None else minutes * TOKENIZER_SHARE)
        phase["images"] = (newest_step(tokenizer.output) - first_steps[0]) * images_per_step(tokenizer)
    with timed(phases, "tokenize") as phase:
        with main_process_first():
            set_aside_earlier_prior(tokenizer.output, prior)
        contents: Contents = "latents" if isinstance(prior, DiffusionTraining) else "indices"
        degradation = prior.degradation if isinstance(prior, DiffusionTraining) else "none"
        run_tokenize(tokenizer.output, source, prior.codes, contents, degradation=degradation, images=inputs.images)
        phase["images"] = len(source.train) + len(source.validation)
    with timed(phases, "train_prior") as phase:
        share = PRIOR_SHARE if tokenizer.model.learns else TOKENIZER_SHARE + PRIOR_SHARE
        folder = run_prior(prior, None if minutes is None else minutes * share)
        phase["images"] = max(0, newest_step(prior.output) - first_steps[1]) * images_per_step(prior)
    pipeline = LatentGenerationPipeline.from_pretrained(folder).to(accelerated_device())
    images = inputs.images.numbered_as(pipeline.label_names)
    if not is_main_process():  # which measures, and is helped to sample
        if not pipeline.prior.is_restoration:
            for _ in sampled_batches(pipeline, balanced_labels(pipeline, num_images), prior.seed):
                pass
        wait_for_everyone()
        return json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    extractor = extractor_for(tokenizer.data, pipeline.tokenizer.config.image_processor, None, quick=True)
    figures, samples = write_results(output, images, pipeline, extractor, prior.seed, num_images, phases)
    metrics = figures | {
        "seconds": round(time.perf_counter() - begin, 1),
        "phases": phases,
        "steps": {"tokenizer": newest_step(tokenizer.output), "prior": newest_step(prior.output)},
        "data": source.name,
    }
    pipeline.to("cpu").save_pretrained(output / "pipeline", metrics=metrics, samples=samples)
    write_json(output / "metrics.json", metrics)  # last: a folder that has it is complete
    wait_for_everyone()
    return metrics


def finished_metrics(
    output: Path, inputs: TokenizerInputs, prior: PriorTraining, minutes: float | None
) -> dict[str, Any] | None:
    """The metrics of a job that has nothing left to do; raises UserError when it was given another configuration."""
    tokenizer = inputs.config
    if minutes is not None:  # has set the steps when the job began
        tokenizer = replace(tokenizer, max_steps=stored_steps(tokenizer) or tokenizer.max_steps)
        prior = replace(prior, max_steps=stored_steps(prior) or prior.max_steps)
    manifest = stored_manifest(prior.codes)
    done = {
        "tokenizer": check_run_folder(tokenizer, "tokenizer", inputs.source.train.fingerprint()),
        "prior": check_run_folder(prior, "prior", codes_fingerprint(manifest) if manifest else ""),
    }
    path = output / "metrics.json"
    if not path.exists() or not (output / "pipeline" / INDEX).exists():
        return None
    held = json.loads(path.read_text(encoding="utf-8"))
    return held if held["steps"] == done else None


def set_aside_earlier_prior(tokenizer_run: Path, prior: PriorTraining) -> None:
    """Makes room for a prior on new codes when the tokenizer of this job was trained further.

    The codes are removed, since they are written again. The trained prior is moved aside: its pipeline still works.
    """
    manifest = stored_manifest(prior.codes)
    if not manifest or manifest["spec"]["tokenizer_id"] == load_tokenizer(tokenizer_run)[0].config.tokenizer_id:
        return
    print_once("the tokenizer was trained further: its codes are written again, and the prior starts again on them")
    if holds_files(prior.output):  # first: no prior is left beside codes that are not its own
        aside = unused_path(prior.output.with_name(f"{prior.output.name}-{newest_step(prior.output)}-steps"))
        prior.output.rename(aside)
        print_once(f"the prior that was trained before is kept in {aside}")
    shutil.rmtree(prior.codes)


def unused_path(path: Path) -> Path:
    """`path`, or where it is taken `path-2`, `path-3` and so on."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return path if not path.exists() else next(other for other in numbered if not other.exists())


def images_per_step(config: RunConfig) -> int:
    return config.batch_size * config.accumulation_steps


def write_results(
    output: Path,
    images: LoadedSource,
    pipeline: LatentGenerationPipeline,
    extractor: FeatureExtractor,
    seed: int,
    num_images: int,
    phases: dict[str, dict[str, float]],
) -> tuple[dict[str, Any], Image]:
    """Samples, the three pictures, and the figures on the source's held-out images."""
    processor = pipeline.tokenizer.config.image_processor
    held_out, train, names = images.held_out, images.train, images.source.label_names or ()
    pipeline.set_progress_bar_config(disable=True)  # the evaluator's counts images
    kept = dict[int, list[Tensor]]()
    restorations = Restorations(pipeline, held_out, num_images, seed) if pipeline.prior.is_restoration else None
    labels = balanced_labels(pipeline, num_images) if restorations is None else restorations.labels
    drawn = sampled_batches(pipeline, labels, seed) if restorations is None else restorations.batches()
    batches = keeping_first(drawn, labels, kept, GRID_ROWS, GRID_COLUMNS)
    with Evaluator(extractor, features_folder(), seed) as evaluator:
        with timed(phases, "sample") as phase:
            samples = evaluator.measure_stream(batches, labels, "sample")
            phase["images"] = len(samples)
        with timed(phases, "evaluate") as phase:
            figures = pipeline_metrics(evaluator, pipeline, samples, held_out, train, names)
            phase["images"] = sum(figures[f"num_{name}images"] for name in ("", "reference_", "training_"))
    if restorations is not None:
        figures |= restorations.figures()
    shown = held_out[range(min(20, len(held_out)))]
    save_image(reconstruction_grid(shown, reconstruct(pipeline.tokenizer, shown)[0]), output / "reconstructions.png")
    picture = sheet(kept, pipeline.label_names)
    save_image(picture, output / "samples.png")
    tokenizer_log, prior_log = (output / stage / "metrics.jsonl" for stage in ("tokenizer", "prior"))
    plot_curves(tokenizer_log, prior_log, pipeline.tokenizer.latent_spec().codebook_size, output / "curves.png")
    return figures | settings_of(extractor, processor, pipeline, seed), picture


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
    folder = output
    agreement, frechet, recall = metrics["class_agreement"], metrics["frechet"], metrics["recall"]
    codes = ""
    if metrics["perplexity"] is not None:
        codes = f", {metrics['codes_used']} codes used, perplexity {metrics['perplexity']:.0f}"
    distance = "too few images to compare" if recall is None else f"Fréchet distance {frechet:.3g}, recall {recall:.3f}"
    lines = [
        "",
        f"pictures  {folder}/samples.png  {folder}/reconstructions.png  {folder}/curves.png",
        f"pipeline  {folder}/pipeline     all figures: {folder}/metrics.json",
        "",
        f"  reconstruction   PSNR {metrics['psnr']:.2f} dB{codes} ({metrics['num_reference_images']} held-out images)",
        f"  samples          {distance} ({metrics['num_images']} images, features: {metrics['features']})",
        *(
            []
            if agreement is None
            else [f"  class agreement  {agreement:.1%} by a classifier that no generator has seen"]
        ),
        f"  time             {metrics['seconds']:.0f} s: "
        + ", ".join(f"{name.replace('_', ' ')} {phase['seconds']:.0f}" for name, phase in metrics["phases"].items()),
        "",
        "next:",
        "  latentloom train --data ./my_images --output runs/mine",
        f"  latentloom sample --pipeline {folder}/pipeline --num-images 64 --output more_samples",
        f"  latentloom push --pipeline {folder}/pipeline --repo-id me/my-generator",
    ]
    return "\n".join(lines)
