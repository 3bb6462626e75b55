"""The main job: train both stages, then write samples, images and metrics into one folder.

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
from latentloom.jobs.evaluation import (
    GRID_COLUMNS,
    GRID_ROWS,
    build_class_grid,
    choose_feature_extractor,
    collect_evaluation_settings,
    features_folder,
)
from latentloom.jobs.stages import load_tokenizer, run_prior, run_tokenize, run_tokenizer, stored_steps
from latentloom.planning.tokenizer_inputs import TokenizerInputs
from pipelines.evaluation.evaluator import Evaluator
from pipelines.evaluation.features import FeatureExtractor
from pipelines.evaluation.pipeline_metrics import balanced_labels, collect_grid_images, pipeline_metrics, sample_batches
from pipelines.evaluation.restoration import Restorations
from pipelines.evaluation.tokenizer_metrics import reconstruct
from pipelines.latent_generation import LatentGenerationPipeline
from pipelines.saving import INDEX, check_pipeline_folder
from stage1_tokenizer.codes.manifest import Contents, codes_fingerprint, find_manifest
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

# Shares of --minutes. The rest is for reading, tokenizing, sampling and evaluating.
TOKENIZER_SHARE, PRIOR_SHARE = 0.42, 0.42


def check_prior(tokenizer: TokenizerConfig, prior: PriorTraining, num_classes: int) -> None:
    """Raise an error before training when the prior's settings do not fit the codes of the tokenizer."""
    spec = new_tokenizer(tokenizer).latent_spec()
    with torch.device("meta"):
        prior.new_prior(spec, num_classes)


def check_stages_fit(tokenizer: TokenizerTraining, prior: PriorTraining) -> None:
    """Raise UserError before training when the prior needs token indices and the tokenizer has none."""
    model = tokenizer.model
    if model.name == "vqgan" or prior.prior == "diffusion":
        return
    hint = (
        ", or run train-tokenizer alone: this tokenizer samples without a prior" if model.samples_without_prior else ""
    )
    raise UserError(
        f"the tokenizer {model.name} has no codes, but the autoregressive prior is trained on codes; expected a "
        f"tokenizer with a codebook, or a diffusion prior. Pass --tokenizer-recipe vqgan-f4 or --recipe diffusion-tiny{hint}"
    )


def run_main_job(
    output: Path,
    inputs: TokenizerInputs,
    prior: PriorTraining,
    *,
    minutes: float | None = None,
    num_images: int = 2000,
) -> dict[str, Any]:
    """Train both stages, or resume them, and write images and `metrics.json`; return the metrics.

    The tokenizer and the prior are trained in `output`/tokenizer and `output`/prior. A finished job is not changed.

    Args:
        minutes: limits the steps of a new job to what fits into this time.
        num_images: number of samples for the metrics.

    Raises:
        UserError: `output` holds files of something else, or the stages do not fit each other.
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
        raise UserError(
            f"{output} is not empty and holds no run of this command; expected a new or empty folder; choose another --output"
        )
    if (finished_metrics := load_finished_metrics(output, inputs, prior, minutes)) is not None:
        steps = " and ".join(f"{count} steps of the {stage}" for stage, count in finished_metrics["steps"].items())
        print_once(f"{output} has finished its {steps}; pass a larger --max-steps to go on, or another --output")
        return finished_metrics
    check_pipeline_folder(output / "pipeline")
    check_prior(inputs.model, prior, len(source.label_names or ()))
    phases: dict[str, dict[str, float]] = {}
    begin = time.perf_counter()
    first_steps = newest_step(tokenizer.output), newest_step(prior.output)  # not 0 in a resumed run
    with time_phase(phases, "train_tokenizer") as phase:
        run_tokenizer(inputs, None if minutes is None else minutes * TOKENIZER_SHARE)
        phase["images"] = (newest_step(tokenizer.output) - first_steps[0]) * images_per_step(tokenizer)
    with time_phase(phases, "tokenize") as phase:
        with main_process_first():
            set_aside_earlier_prior(tokenizer.output, prior)
        contents: Contents = "latents" if isinstance(prior, DiffusionTraining) else "indices"
        degradation = prior.degradation if isinstance(prior, DiffusionTraining) else "none"
        run_tokenize(tokenizer.output, source, prior.codes, contents, degradation=degradation, images=inputs.images)
        phase["images"] = len(source.train) + len(source.validation)
    with time_phase(phases, "train_prior") as phase:
        share = PRIOR_SHARE if tokenizer.model.is_trainable else TOKENIZER_SHARE + PRIOR_SHARE
        folder = run_prior(prior, None if minutes is None else minutes * share)
        phase["images"] = max(0, newest_step(prior.output) - first_steps[1]) * images_per_step(prior)
    pipeline = LatentGenerationPipeline.from_pretrained(folder).to(accelerated_device())
    images = inputs.images.with_label_order(pipeline.label_names)
    if not is_main_process():  # the main process evaluates; the others only help it to sample
        if not pipeline.prior.is_restoration:
            for _ in sample_batches(pipeline, balanced_labels(pipeline, num_images), prior.seed):
                pass
        wait_for_everyone()
        return json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    extractor = choose_feature_extractor(tokenizer.data, pipeline.tokenizer.config.image_processor, None, quick=True)
    metrics, sample_image = write_results(output, images, pipeline, extractor, prior.seed, num_images, phases)
    metrics |= {
        "seconds": round(time.perf_counter() - begin, 1),
        "phases": phases,
        "steps": {"tokenizer": newest_step(tokenizer.output), "prior": newest_step(prior.output)},
        "data": source.name,
    }
    pipeline.to("cpu").save_pretrained(output / "pipeline", metrics=metrics, samples=sample_image)
    write_json(output / "metrics.json", metrics)  # written last: it marks the job as complete
    wait_for_everyone()
    return metrics


def load_finished_metrics(
    output: Path, inputs: TokenizerInputs, prior: PriorTraining, minutes: float | None
) -> dict[str, Any] | None:
    """Load the metrics of a finished job; return None when there is work left.

    Raises:
        UserError: the folder holds a job with another configuration.
    """
    tokenizer = inputs.config
    if minutes is not None:  # --minutes set the steps once, when the job began
        tokenizer = replace(tokenizer, max_steps=stored_steps(tokenizer) or tokenizer.max_steps)
        prior = replace(prior, max_steps=stored_steps(prior) or prior.max_steps)
    manifest = find_manifest(prior.codes)
    finished_steps = {
        "tokenizer": check_run_folder(tokenizer, "tokenizer", inputs.source.train.fingerprint()),
        "prior": check_run_folder(prior, "prior", codes_fingerprint(manifest) if manifest else ""),
    }
    path = output / "metrics.json"
    if not path.exists() or not (output / "pipeline" / INDEX).exists():
        return None
    metrics = json.loads(path.read_text(encoding="utf-8"))
    return metrics if metrics["steps"] == finished_steps else None


def set_aside_earlier_prior(tokenizer_run: Path, prior: PriorTraining) -> None:
    """Make room for new codes and a new prior when the tokenizer of this job was trained further.

    The code cache is removed, because it is written again. The prior's run is moved aside: its pipeline still works.
    """
    manifest = find_manifest(prior.codes)
    if not manifest or manifest["spec"]["tokenizer_id"] == load_tokenizer(tokenizer_run)[0].config.tokenizer_id:
        return
    print_once("the tokenizer was trained further: its codes are written again, and the prior starts again on them")
    if holds_files(
        prior.output
    ):  # moved before the codes change, so that a kill leaves no prior with codes of another tokenizer
        kept_folder = find_unused_path(prior.output.with_name(f"{prior.output.name}-{newest_step(prior.output)}-steps"))
        prior.output.rename(kept_folder)
        print_once(f"the earlier prior is kept in {kept_folder}")
    shutil.rmtree(prior.codes)


def find_unused_path(path: Path) -> Path:
    """Return `path` if it does not exist, else the first unused of `path-2`, `path-3` and so on."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return path if not path.exists() else next(candidate for candidate in numbered if not candidate.exists())


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
    """Sample and evaluate the pipeline; write `samples.png`, `reconstructions.png` and `curves.png`.

    Returns:
        The metrics on the held-out images with the evaluation settings, and the image of the samples.
    """
    processor = pipeline.tokenizer.config.image_processor
    held_out, train, names = images.held_out, images.train, images.source.label_names or ()
    pipeline.set_progress_bar_config(disable=True)  # the evaluator shows a progress bar of its own
    first_samples = dict[int, list[Tensor]]()
    restorations = Restorations(pipeline, held_out, num_images, seed) if pipeline.prior.is_restoration else None
    labels = balanced_labels(pipeline, num_images) if restorations is None else restorations.labels
    sampled = sample_batches(pipeline, labels, seed) if restorations is None else restorations.batches()
    batches = collect_grid_images(sampled, labels, first_samples, GRID_ROWS, GRID_COLUMNS)
    with Evaluator(extractor, features_folder(), seed) as evaluator:
        with time_phase(phases, "sample") as phase:
            samples = evaluator.measure_stream(batches, labels, "sample")
            phase["images"] = len(samples)
        with time_phase(phases, "evaluate") as phase:
            metrics = pipeline_metrics(evaluator, pipeline, samples, held_out, train, names)
            phase["images"] = sum(metrics[f"num_{name}images"] for name in ("", "reference_", "training_"))
    if restorations is not None:
        metrics |= restorations.metrics()
    originals = held_out[range(min(20, len(held_out)))]
    reconstructions = reconstruct(pipeline.tokenizer, originals)[0]
    save_image(reconstruction_grid(originals, reconstructions), output / "reconstructions.png")
    sample_image = build_class_grid(first_samples, pipeline.label_names)
    save_image(sample_image, output / "samples.png")
    tokenizer_log, prior_log = (output / stage / "metrics.jsonl" for stage in ("tokenizer", "prior"))
    plot_curves(tokenizer_log, prior_log, pipeline.tokenizer.latent_spec().codebook_size, output / "curves.png")
    return metrics | collect_evaluation_settings(extractor, processor, pipeline, seed), sample_image


@contextmanager
def time_phase(phases: dict[str, dict[str, float]], name: str) -> Iterator[dict[str, float]]:
    """Record the seconds of a block and its images per second; the block sets `phase["images"]`."""
    begin = time.perf_counter()
    phase: dict[str, float] = {}
    yield phase
    seconds = time.perf_counter() - begin
    phases[name] = {"seconds": round(seconds, 1)} | phase
    phases[name]["images_per_second"] = round(phase["images"] / seconds, 1)


def format_summary(output: Path, metrics: dict[str, Any]) -> str:
    """Format the closing text of the command: the files, the metrics and the next commands."""
    agreement, frechet, recall = metrics["class_agreement"], metrics["frechet"], metrics["recall"]
    codes = ""
    if metrics["perplexity"] is not None:
        codes = f", {metrics['codes_used']} codes used, perplexity {metrics['perplexity']:.0f}"
    distance = (
        "too few images for a Fréchet distance"
        if recall is None
        else f"Fréchet distance {frechet:.3g}, recall {recall:.3f}"
    )
    lines = [
        "",
        f"images    {output}/samples.png  {output}/reconstructions.png  {output}/curves.png",
        f"pipeline  {output}/pipeline     all metrics: {output}/metrics.json",
        "",
        f"  reconstruction   PSNR {metrics['psnr']:.2f} dB{codes} ({metrics['num_reference_images']} held-out images)",
        f"  samples          {distance} ({metrics['num_images']} images, features: {metrics['features']})",
        *(
            []
            if agreement is None
            else [f"  class agreement  {agreement:.1%} by a classifier that no generator was trained with"]
        ),
        f"  time             {metrics['seconds']:.0f} s: "
        + ", ".join(f"{name.replace('_', ' ')} {phase['seconds']:.0f}" for name, phase in metrics["phases"].items()),
        "",
        "next:",
        "  latentloom train --data ./my_images --output runs/mine",
        f"  latentloom sample --pipeline {output}/pipeline --num-images 64 --output more_samples",
        f"  latentloom push --pipeline {output}/pipeline --repo-id me/my-generator",
    ]
    return "\n".join(lines)
