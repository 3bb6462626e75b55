"""The quickstart against a baseline stack (diffusers VQModel + transformers Llama) at equal training time.

At each budget both stacks are trained from scratch, one after the other, with learning rates that decay over the budget. First
ours is trained for a share of the quickstart's steps. Then the baseline stack (`baseline_stack`) is trained for exactly the
seconds that our tokenizer, tokenizing and prior took. A reference classifier that was not used in training evaluates 2,000
samples, 200 of each class, against the 2,000 test images. At each budget each stack uses the better of two guidance scales.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import baseline_stack
import torch
from frame import OURS, Report, load_recipe, markdown_table
from torch import Tensor

from latentloom.data.embedded import FASHION_MNIST, classifier_path
from latentloom.jobs.stages import load_source, run_prior, run_tokenize, run_tokenizer
from latentloom.planning.tokenizer_inputs import tokenizer_inputs
from pipelines.evaluation.features import FeatureExtractor, classifier_features
from pipelines.evaluation.frechet import frechet_distance
from pipelines.evaluation.linear_probe import class_agreement
from pipelines.evaluation.manifolds import precision_recall
from pipelines.evaluation.pipeline_metrics import balanced_labels, sample_batches
from pipelines.evaluation.reference_classifier import ReferenceClassifier
from pipelines.evaluation.tokenizer_metrics import reconstruct
from pipelines.latent_generation import LatentGenerationPipeline
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.image_processor import ImageProcessor
from stage1_tokenizer.metrics import codebook_usage, psnr
from stage1_tokenizer.training_config import TokenizerTraining
from stage2_prior.training_config import AutoregressiveTraining
from training_harness.matmul_precision import reduced_matmul_precision

BASELINE = "diffusers VQModel + transformers Llama"
# Shares of the quickstart's steps for tokenizer and prior. In a short run the steps of the prior are worth more.
SHARES = ((0.08, 0.12), (0.14, 0.25), (0.45, 0.55), (1.0, 1.0))
OUR_GUIDANCE, BASELINE_GUIDANCE = (3.5, 4.5), (2.0, 2.5)  # our guidance grows while an image is sampled
METRICS = {
    "psnr": "PSNR, dB",
    "perplexity": "perplexity",
    "reconstruction_frechet": "Fréchet distance, reconstructions",
    "frechet": "Fréchet distance, samples",
    "guidance_scale": "guidance scale",
    "agreement": "agreement",
    "recall": "recall",
    "precision": "precision",
    "tokenizer_rate": "tokenizer, images/s",
    "prior_rate": "prior, images/s",
    "sampling_rate": "sampling, images/s",
}


class Evaluation:
    """The embedded images, the reference classifier, and the metrics that are computed with them."""

    def __init__(self) -> None:
        self.source = load_source(FASHION_MNIST)
        self.processor = ImageProcessor(channels=1, content_size=(28, 28), image_size=(28, 28))
        train, test = (ImageLoader(split, self.processor) for split in (self.source.train, self.source.held_out))
        self.train, self.test = train[range(len(train))], test[range(len(test))]
        self.labels = torch.tensor(train.labels())
        self.extractor: FeatureExtractor = classifier_features(ReferenceClassifier.from_pretrained(classifier_path()))
        self.real = self.extractor.extract(self.test).features

    def reconstruction_metrics(self, reconstructions: Tensor, indices: Tensor) -> dict[str, float]:
        counts = torch.bincount(indices.flatten(), minlength=baseline_stack.CODES)
        return {
            "psnr": psnr(reconstructions, self.test).mean().item(),
            "perplexity": codebook_usage(counts).perplexity,
            "reconstruction_frechet": frechet_distance(self.extractor.extract(reconstructions).features, self.real),
        }

    def sample_metrics(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        features = self.extractor.extract(images)
        assert features.class_logits is not None
        return {
            "frechet": frechet_distance(features.features, self.real),
            "agreement": class_agreement(features.class_logits, labels),
        } | precision_recall(self.real, features.features)._asdict()


def train_ours(evaluation: Evaluation, shares: tuple[float, float], samples: int, seed: int) -> dict[str, float]:
    """Train our stack for `shares` of the quickstart's steps, and evaluate it.

    Args:
        shares: share of the tokenizer's steps and share of the prior's steps.

    Returns:
        The metrics; `seconds` is the training time up to the saved pipeline.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = load_recipe(
            TokenizerTraining, "tokenizer", "vqgan-f4", shares[0], seed, data=FASHION_MNIST, output=folder / "t"
        )
        prior = load_recipe(
            AutoregressiveTraining, "prior", "ar-tiny", shares[1], seed, codes=folder / "codes", output=folder / "p"
        )
        tokenizer_seconds = measure_seconds(lambda: run_tokenizer(tokenizer_inputs(tokenizer, evaluation.source)))
        tokenize_seconds = measure_seconds(
            lambda: run_tokenize(tokenizer.output, evaluation.source, prior.codes, "indices")
        )
        prior_seconds = measure_seconds(lambda: run_prior(prior))
        pipeline = LatentGenerationPipeline.from_pretrained(prior.output)
        reconstructions, indices = reconstruct(pipeline.tokenizer, evaluation.test)
        pipeline.set_progress_bar_config(disable=True)
        labels = balanced_labels(pipeline, samples)
        sampling_seconds, metrics_by_scale = list[float](), list[dict[str, float]]()
        for scale in OUR_GUIDANCE:
            begin = time.perf_counter()
            images = torch.cat(list(sample_batches(pipeline, labels, seed, guidance_scale=scale)))
            sampling_seconds.append(time.perf_counter() - begin)
            metrics_by_scale.append({"guidance_scale": scale} | evaluation.sample_metrics(images, labels))
        sampling = sum(sampling_seconds) / len(sampling_seconds)
        return (
            {"seconds": tokenizer_seconds + tokenize_seconds + prior_seconds}
            | evaluation.reconstruction_metrics(reconstructions, indices)
            | min(metrics_by_scale, key=lambda metrics: metrics["frechet"])
            | {
                "tokenizer_rate": tokenizer.max_steps * tokenizer.batch_size / tokenizer_seconds,
                "prior_rate": prior.max_steps * prior.batch_size / prior_seconds,
                "sampling_rate": len(labels) / sampling,
            }
        )


def train_baseline(
    evaluation: Evaluation, seconds: float, samples: int, seed: int, tuning: baseline_stack.Tuning
) -> dict[str, float]:
    """Train the baseline stack for `seconds`, and evaluate it."""
    pixels, share = evaluation.processor.preprocess(evaluation.train), tuning.tokenizer_share
    with reduced_matmul_precision(torch.device("cpu"), enabled=True):
        tokenizer = baseline_stack.train_tokenizer(pixels, seconds * share, tuning, seed)
        begin = time.perf_counter()
        tokens = baseline_stack.encode(tokenizer.model, pixels)
        encoding_seconds = time.perf_counter() - begin
        prior = baseline_stack.train_prior(
            tokens, evaluation.labels, seconds * (1 - share) - encoding_seconds, tuning, seed
        )
    indices = baseline_stack.encode(tokenizer.model, evaluation.processor.preprocess(evaluation.test))
    reconstruction_metrics = evaluation.reconstruction_metrics(baseline_stack.decode(tokenizer.model, indices), indices)
    labels = torch.arange(baseline_stack.CLASSES).repeat_interleave(samples // baseline_stack.CLASSES)
    metrics_by_scale, begin = list[dict[str, float]](), time.perf_counter()
    for scale in BASELINE_GUIDANCE:
        torch.manual_seed(seed)
        sampled_tokens = baseline_stack.sample(prior.model, labels, tokens.shape[1], scale)
        images = baseline_stack.decode(tokenizer.model, sampled_tokens)
        metrics_by_scale.append({"guidance_scale": scale} | evaluation.sample_metrics(images, labels))
    sampling = (time.perf_counter() - begin) / len(BASELINE_GUIDANCE)
    return (
        {"seconds": seconds}
        | reconstruction_metrics
        | min(metrics_by_scale, key=lambda metrics: metrics["frechet"])
        | {
            "tokenizer_rate": tokenizer.images_per_second,
            "prior_rate": prior.images_per_second,
            "sampling_rate": len(labels) / sampling,
        }
    )


def measure_seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def run(quick: bool) -> Report:
    evaluation, tuning, seed = Evaluation(), baseline_stack.Tuning(), 0
    budgets, samples = (((0.02, 0.03),), 100) if quick else (SHARES, 2000)
    curves: dict[str, list[dict[str, float]]] = {OURS: [], BASELINE: []}
    for shares in budgets:
        curves[OURS].append(train_ours(evaluation, shares, samples, seed))
        curves[BASELINE].append(train_baseline(evaluation, curves[OURS][-1]["seconds"], samples, seed, tuning))
        print({name: {k: round(v, 3) for k, v in points[-1].items()} for name, points in curves.items()}, flush=True)
    return Report(
        name="baseline",
        title="The quickstart and a baseline stack at equal training time",
        text=describe_results(curves),
        results={"seed": seed, "num_images": samples, "tuning": dataclasses.asdict(tuning), "curves": curves},
        peers=("diffusers", "transformers"),
        chart=lambda path: plot_chart(curves, path),
    )


def describe_results(curves: dict[str, list[dict[str, float]]]) -> str:
    our_points, baseline_points = curves[OURS], curves[BASELINE]
    full = markdown_table(
        ["", OURS, BASELINE],
        [["seconds of training", our_points[-1]["seconds"], baseline_points[-1]["seconds"]]]
        + [[name, our_points[-1][key], baseline_points[-1][key]] for key, name in METRICS.items()],
    )
    budgets = markdown_table(
        ["seconds", "", "PSNR, dB", "Fréchet distance", "agreement", "recall"],
        [
            [point["seconds"], name, *(point[key] for key in ("psnr", "frechet", "agreement", "recall"))]
            for pair in zip(our_points, baseline_points, strict=True)
            for name, point in zip(curves, pair, strict=True)
        ],
    )
    ratio = our_points[-1]["frechet"] / baseline_points[-1]["frechet"]
    reached_seconds = next((p["seconds"] for p in our_points if p["frechet"] <= baseline_points[-1]["frechet"]), None)
    reached_text = (
        f"ours reaches the baseline's final distance in {reached_seconds / baseline_points[-1]['seconds']:.0%} of its time"
        if reached_seconds
        else "ours does not reach the baseline's final distance"
    )
    return "\n\n".join(
        [
            (__doc__ or "").partition("\n\n")[2].strip(),
            full,
            f"At the full budget our Fréchet distance is {ratio:.0%} of the baseline's, and {reached_text}. "
            "All budgets, each trained from scratch:",
            budgets,
        ]
    )


def plot_chart(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    seconds = [point["seconds"] for point in curves[OURS]]
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.8), layout="constrained")
    for axis, key in zip(axes, ("psnr", "frechet", "agreement", "recall"), strict=True):
        for name, points in curves.items():
            axis.plot(seconds, [p[key] for p in points], "o-", label=name)
        axis.set(title=METRICS[key], xlabel="seconds of training, both stages", xscale="log")
        axis.set_xticks(seconds, [f"{number:.0f}" for number in seconds])
        axis.xaxis.set_minor_locator(NullLocator())
        if key == "frechet":
            axis.axhline(curves[BASELINE][-1][key], color="grey", ls=":", lw=1)
            axis.set_yscale("log")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
