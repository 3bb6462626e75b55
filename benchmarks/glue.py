"""latentloom's quickstart against the stack that a user would glue together, for the same seconds, by the same judge.

At each budget both stacks are trained from scratch, one after the other, with learning rates that decay over the budget:
first ours, at shares of the quickstart's steps, then the baseline stack (`baseline_stack`) for exactly the seconds that our
tokenizer, tokenizing and prior took. A reference classifier that neither has seen measures 2,000 samples, 200 of each class,
against the 2,000 test images. At each budget each stack uses the better of two guidance scales.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import baseline_stack
import torch
from frame import OURS, Report, recipe, table
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
# Of the quickstart's steps, tokenizer and prior: in a short run the prior's are worth more.
SHARES = ((0.08, 0.12), (0.14, 0.25), (0.45, 0.55), (1.0, 1.0))
OUR_GUIDANCE, THEIR_GUIDANCE = (3.5, 4.5), (2.0, 2.5)  # ours grows while an image is drawn
FIGURES = {
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


class Bench:
    """The embedded images, and the judge."""

    def __init__(self) -> None:
        self.source = load_source(FASHION_MNIST)
        self.processor = ImageProcessor(channels=1, content_size=(28, 28), image_size=(28, 28))
        train, test = (ImageLoader(split, self.processor) for split in (self.source.train, self.source.held_out))
        self.train, self.test = train[range(len(train))], test[range(len(test))]
        self.labels = torch.tensor(train.labels())
        self.extractor: FeatureExtractor = classifier_features(ReferenceClassifier.from_pretrained(classifier_path()))
        self.real = self.extractor.extract(self.test).features

    def reconstruction_metrics(self, rebuilt: Tensor, indices: Tensor) -> dict[str, float]:
        counts = torch.bincount(indices.flatten(), minlength=baseline_stack.CODES)
        return {
            "psnr": psnr(rebuilt, self.test).mean().item(),
            "perplexity": codebook_usage(counts).perplexity,
            "reconstruction_frechet": frechet_distance(self.extractor.extract(rebuilt).features, self.real),
        }

    def sample_metrics(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        seen = self.extractor.extract(images)
        assert seen.class_logits is not None
        return {
            "frechet": frechet_distance(seen.features, self.real),
            "agreement": class_agreement(seen.class_logits, labels),
        } | precision_recall(self.real, seen.features)._asdict()


def ours(bench: Bench, shares: tuple[float, float], samples: int, seed: int) -> dict[str, float]:
    """`shares` of the quickstart's steps, tokenizer and prior; the seconds of everything up to a pipeline that is saved."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = recipe(
            TokenizerTraining, "tokenizer", "vqgan-f4", shares[0], seed, data=FASHION_MNIST, output=folder / "t"
        )
        prior = recipe(
            AutoregressiveTraining, "prior", "ar-tiny", shares[1], seed, codes=folder / "codes", output=folder / "p"
        )
        first = timed(lambda: run_tokenizer(tokenizer_inputs(tokenizer, bench.source)))
        middle = timed(lambda: run_tokenize(tokenizer.output, bench.source, prior.codes, "indices"))
        last = timed(lambda: run_prior(prior))
        pipeline = LatentGenerationPipeline.from_pretrained(prior.output)
        rebuilt, indices = reconstruct(pipeline.tokenizer, bench.test)
        pipeline.set_progress_bar_config(disable=True)
        labels, taken, tried = balanced_labels(pipeline, samples), list[float](), list[dict[str, float]]()
        for scale in OUR_GUIDANCE:
            begin = time.perf_counter()
            images = torch.cat(list(sample_batches(pipeline, labels, seed, guidance_scale=scale)))
            taken.append(time.perf_counter() - begin)
            tried.append({"guidance_scale": scale} | bench.sample_metrics(images, labels))
        sampling = sum(taken) / len(taken)
        return (
            {"seconds": first + middle + last}
            | bench.reconstruction_metrics(rebuilt, indices)
            | min(tried, key=lambda figures: figures["frechet"])
            | {
                "tokenizer_rate": tokenizer.max_steps * tokenizer.batch_size / first,
                "prior_rate": prior.max_steps * prior.batch_size / last,
                "sampling_rate": len(labels) / sampling,
            }
        )


def theirs(bench: Bench, seconds: float, samples: int, seed: int, tuning: baseline_stack.Tuning) -> dict[str, float]:
    """The glue stack for as many seconds."""
    pixels, share = bench.processor.preprocess(bench.train), tuning.tokenizer_share
    with reduced_matmul_precision(torch.device("cpu"), enabled=True):
        tokenizer = baseline_stack.train_tokenizer(pixels, seconds * share, tuning, seed)
        encoding = time.perf_counter()
        tokens = baseline_stack.encode(tokenizer.model, pixels)
        encoding = time.perf_counter() - encoding
        prior = baseline_stack.train_prior(tokens, bench.labels, seconds * (1 - share) - encoding, tuning, seed)
    indices = baseline_stack.encode(tokenizer.model, bench.processor.preprocess(bench.test))
    figures = bench.reconstruction_metrics(baseline_stack.decode(tokenizer.model, indices), indices)
    labels = torch.arange(baseline_stack.CLASSES).repeat_interleave(samples // baseline_stack.CLASSES)
    tried, begin = list[dict[str, float]](), time.perf_counter()
    for scale in THEIR_GUIDANCE:
        torch.manual_seed(seed)
        drawn = baseline_stack.sample(prior.model, labels, tokens.shape[1], scale)
        images = baseline_stack.decode(tokenizer.model, drawn)
        tried.append({"guidance_scale": scale} | bench.sample_metrics(images, labels))
    sampling = (time.perf_counter() - begin) / len(THEIR_GUIDANCE)
    return (
        {"seconds": seconds}
        | figures
        | min(tried, key=lambda figures: figures["frechet"])
        | {
            "tokenizer_rate": tokenizer.images_per_second,
            "prior_rate": prior.images_per_second,
            "sampling_rate": len(labels) / sampling,
        }
    )


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def run(quick: bool) -> Report:
    bench, tuning, seed = Bench(), baseline_stack.Tuning(), 0
    budgets, samples = (((0.02, 0.03),), 100) if quick else (SHARES, 2000)
    curves: dict[str, list[dict[str, float]]] = {OURS: [], BASELINE: []}
    for shares in budgets:
        curves[OURS].append(ours(bench, shares, samples, seed))
        curves[BASELINE].append(theirs(bench, curves[OURS][-1]["seconds"], samples, seed, tuning))
        print({name: {k: round(v, 3) for k, v in points[-1].items()} for name, points in curves.items()}, flush=True)
    return Report(
        name="glue",
        title="The quickstart and a baseline stack at equal training time",
        text=words(curves),
        figures={"seed": seed, "num_images": samples, "tuning": dataclasses.asdict(tuning), "curves": curves},
        peers=("diffusers", "transformers"),
        chart=lambda path: draw(curves, path),
    )


def words(curves: dict[str, list[dict[str, float]]]) -> str:
    own, glue = curves[OURS], curves[BASELINE]
    full = table(
        ["", OURS, BASELINE],
        [["seconds of training", own[-1]["seconds"], glue[-1]["seconds"]]]
        + [[name, own[-1][key], glue[-1][key]] for key, name in FIGURES.items()],
    )
    budgets = table(
        ["seconds", "", "PSNR, dB", "Fréchet distance", "agreement", "recall"],
        [
            [point["seconds"], name, *(point[key] for key in ("psnr", "frechet", "agreement", "recall"))]
            for pair in zip(own, glue, strict=True)
            for name, point in zip(curves, pair, strict=True)
        ],
    )
    ratio = own[-1]["frechet"] / glue[-1]["frechet"]
    reached = next((p["seconds"] for p in own if p["frechet"] <= glue[-1]["frechet"]), None)
    reached_words = (
        f"ours reaches the baseline's final distance in {reached / glue[-1]['seconds']:.0%} of its time"
        if reached
        else "ours does not reach the baseline's final distance"
    )
    return "\n\n".join(
        [
            (__doc__ or "").partition("\n\n")[2].strip(),
            full,
            f"At the full budget our Fréchet distance is {ratio:.0%} of the baseline's, and {reached_words}. "
            "All budgets, each trained from scratch:",
            budgets,
        ]
    )


def draw(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    seconds = [point["seconds"] for point in curves[OURS]]
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.8), layout="constrained")
    for axis, key in zip(axes, ("psnr", "frechet", "agreement", "recall"), strict=True):
        for name, points in curves.items():
            axis.plot(seconds, [p[key] for p in points], "o-", label=name)
        axis.set(title=FIGURES[key], xlabel="seconds of training, both stages", xscale="log")
        axis.set_xticks(seconds, [f"{number:.0f}" for number in seconds])
        axis.xaxis.set_minor_locator(NullLocator())
        if key == "frechet":
            axis.axhline(curves[BASELINE][-1][key], color="grey", ls=":", lw=1)
            axis.set_yscale("log")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
