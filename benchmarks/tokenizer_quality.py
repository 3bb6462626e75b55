"""All quantizers and diffusers' VQModel after the same training time on a set of small images.

Each tokenizer is trained from scratch, from reading the images to a saved model, with a learning rate that decays over the
given time. VQModel has the settings that were tuned for the comparison of whole stacks (docs/LOG.md). It is trained for as
many seconds as our default took. If images are not 32×32, both are also trained on images padded to 32×32, which gives 64
codes at f = 4. Metrics are on held-out images. The Fréchet distance uses features that no tokenizer was trained on: those of
the reference classifier for the embedded images, those of EfficientNet-Lite0 for colour images.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import image_sets
import torch
from frame import Report, markdown_table
from torch import Tensor

from latentloom.commands.arguments import training_values
from latentloom.data.embedded import FASHION_MNIST, classifier_path
from latentloom.jobs.stages import load_source, run_tokenizer
from latentloom.planning.tokenizer_inputs import tokenizer_inputs
from pipelines.evaluation.evaluator import BATCH
from pipelines.evaluation.features import FeatureExtractor, feature_extractor
from pipelines.evaluation.frechet import frechet_distance
from pipelines.evaluation.tokenizer_metrics import reconstruct
from stage1_tokenizer.data.image_grids import image_grid, save_image
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.image_processor import ImageProcessor
from stage1_tokenizer.data.sources import ImageSource, open_source
from stage1_tokenizer.metrics import codebook_usage, psnr, ssim
from stage1_tokenizer.registry import saved_tokenizer
from stage1_tokenizer.training_config import TokenizerTraining
from training_harness.configuration import from_mapping
from training_harness.matmul_precision import reduced_matmul_precision

PEER = "diffusers VQModel"
RECIPES = ("ema", "vq-vae", "rotation", "normalized", "simvq", "ibq", "fsq", "lfq", "bsq", "residual")
SHARES = (0.125, 0.25, 0.5)  # of the minutes, for our default on the embedded images: how early does it reach VQModel?
PADDED = 32  # pixels per side, for 64 codes at f = 4
CACHE = Path("~/.cache/latentloom/benchmarks").expanduser()
GRID_COLUMNS = 12
COLUMNS = {"psnr": "PSNR, dB", "ssim": "SSIM", "frechet": "Fréchet distance", "perplexity": "perplexity"}
COLUMNS |= {"bits": "bits per image", "rate": "images/s", "seconds": "seconds"}


@dataclass
class BenchmarkImages:
    """A set of images with the metrics that are computed on its held-out images."""

    name: str
    data: str
    source: ImageSource
    size: int
    extractor: FeatureExtractor

    def __post_init__(self) -> None:
        self.channels = 1 if self.data == FASHION_MNIST else 3
        sizes = {"content_size": (self.size, self.size), "image_size": (self.size, self.size)}
        self.processor = ImageProcessor(channels=self.channels, **sizes)
        self.train, self.test = (
            ImageLoader(split, self.processor) for split in (self.source.train, self.source.held_out)
        )
        self.originals = self.test[range(len(self.test))]
        self.real = self.extractor.extract(self.originals).features

    def measure(self, reconstructions: Tensor, indices: Tensor, codebook_size: int) -> dict[str, float]:
        """Compute the metrics of the reconstructed held-out images, uint8 (N, C, h, w)."""
        counts = torch.bincount(indices.flatten(), minlength=codebook_size)
        return {
            "psnr": psnr(reconstructions, self.originals).mean().item(),
            "ssim": ssim(reconstructions, self.originals).mean().item(),
            "frechet": frechet_distance(self.extractor.extract(reconstructions).features, self.real),
            "perplexity": codebook_usage(counts).perplexity,
            "codes_used": int((counts > 0).sum()),
            "bits": indices[0].numel() * math.log2(codebook_size),
        }


def load_benchmark_images(name: str) -> BenchmarkImages:
    """Load the images named "embedded" or "colour"."""
    if name == "embedded":
        classifier = feature_extractor("classifier", classifier=classifier_path())
        return BenchmarkImages(name, FASHION_MNIST, load_source(FASHION_MNIST), 28, classifier)
    folder = image_sets.prepare_colour_images(CACHE / name)
    return BenchmarkImages(
        name, str(folder), open_source(folder), image_sets.SIDE, feature_extractor("efficientnet-lite0")
    )


def train_ours(
    images: BenchmarkImages, recipe: str, size: int, minutes: float, seed: int
) -> tuple[dict[str, Any], Tensor]:
    """Train a recipe on the images, padded to `size` pixels per side where they are smaller."""
    with TemporaryDirectory() as temporary:
        fields = {"data": images.data, "output": str(Path(temporary) / "run"), "seed": seed, "sample_every": 10**9}
        fields |= {"resolution": str(size)}
        config = from_mapping(TokenizerTraining, training_values("tokenizer", recipe, None, fields))
        begin = time.perf_counter()
        folder = run_tokenizer(tokenizer_inputs(replace(config, checkpoint_every=10**9), images.source), minutes)
        seconds = time.perf_counter() - begin
        tokenizer = saved_tokenizer(folder)
        batches = [reconstruct(tokenizer, batch) for batch in images.originals.split(BATCH)]
        reconstructions, indices = (torch.cat(parts) for parts in zip(*batches, strict=True))
        steps = int(next((folder.parent / "checkpoints").iterdir()).name.removeprefix("step_"))
        metrics = images.measure(reconstructions, indices, tokenizer.codebook_size or 0)
        return metrics | {"seconds": seconds, "rate": steps * config.batch_size / seconds}, reconstructions


def train_baseline(images: BenchmarkImages, size: int, seconds: float, seed: int) -> tuple[dict[str, Any], Tensor]:
    """Train VQModel on the same images for `seconds`."""
    import baseline_stack

    content = (images.size, images.size)
    processor = replace(images.processor, image_size=(size, size), content_size=content)
    tuning = baseline_stack.Tuning()
    begin = time.perf_counter()
    pixels = processor.preprocess(images.train[range(len(images.train))])
    with reduced_matmul_precision(torch.device("cpu"), enabled=True):
        trained = baseline_stack.train_tokenizer(pixels, seconds, tuning, seed)
    seconds = time.perf_counter() - begin
    codes = baseline_stack.encode(trained.model, processor.preprocess(images.originals))
    reconstructions = processor.postprocess(baseline_stack.decode(trained.model, codes).float() / 127.5 - 1)
    rate = trained.steps * tuning.tokenizer_batch / seconds
    metrics = images.measure(reconstructions, codes, baseline_stack.CODES)
    return metrics | {"seconds": seconds, "rate": rate}, reconstructions


def run_benchmark(
    images: BenchmarkImages, minutes: float, seed: int, recipes: tuple[str, ...], shares: tuple[float, ...]
) -> Report:
    """Train all tokenizers one after the other.

    Args:
        recipes: our recipes, the default first.
        shares: shares of the minutes for shorter runs of the default.
    """
    rows: dict[str, dict[str, Any]] = {}
    grid_rows = {"original": images.originals[:GRID_COLUMNS]}

    def add(name: str, work: Callable[[], tuple[dict[str, Any], Tensor]]) -> None:
        rows[name], reconstructions = work()
        grid_rows[name] = reconstructions[:GRID_COLUMNS]
        print(name, {key: round(value, 3) for key, value in rows[name].items()}, flush=True)

    def add_ours(name: str, recipe: str, size: int, share: float = 1.0) -> None:
        add(name, lambda: train_ours(images, recipe, size, share * minutes, seed))

    default, *others = recipes
    for size in image_sizes(images) if others else [images.size]:
        name = f"{default}, {count_codes(size)} codes"
        add_ours(name, default, size)
        add(f"{PEER}, {count_codes(size)} codes", lambda: train_baseline(images, size, rows[name]["seconds"], seed))  # noqa: B023 - called at once
    for share in shares:
        add_ours(f"{default}, {count_codes(images.size)} codes, {share:g} of the time", default, images.size, share)
    for recipe in others:
        add_ours(recipe, recipe, images.size)
    results = {
        "seed": seed,
        "minutes": minutes,
        "num_images": len(images.originals),
        "features": images.extractor.name,
        "rows": rows,
    }
    return Report(
        name=f"tokenizer_quality_{images.name}",
        title=f"Quantizers after {minutes:g} minutes of training: {images.name} images",
        text=describe_results(images, minutes, rows, recipes[0]),
        results=results,
        peers=("diffusers",),
        chart=lambda path: save_image(
            image_grid(torch.cat(list(grid_rows.values())), GRID_COLUMNS, list(grid_rows), scale=2), path
        ),
    )


def image_sizes(images: BenchmarkImages) -> list[int]:
    """Return the image sizes that the default and VQModel are trained on."""
    return sorted({images.size, PADDED})


def count_codes(size: int) -> int:
    """Return the number of codes of an image at f = 4."""
    return (size // 4) ** 2


def describe_results(images: BenchmarkImages, minutes: float, rows: dict[str, dict[str, Any]], default: str) -> str:
    metrics_table = markdown_table(
        ["", *COLUMNS.values()], [[name, *(row[key] for key in COLUMNS)] for name, row in rows.items()]
    )
    sentences = []
    for codes in map(count_codes, image_sizes(images)):
        if (ours := rows.get(f"{default}, {codes} codes")) is None:
            continue
        peer = rows[f"{PEER}, {codes} codes"]
        sentences.append(
            f"At {codes} codes our default, `{default}`, is {ours['psnr'] - peer['psnr']:+.2f} dB from VQModel, with "
            f"{ours['frechet'] / peer['frechet']:.0%} of its Fréchet distance."
        )
        shorter_runs = [row for name, row in rows.items() if name.startswith(f"{default}, {codes} codes, ")]
        reaching_seconds = [row["seconds"] for row in shorter_runs if row["psnr"] >= peer["psnr"]]
        if reaching_seconds:
            sentences.append(
                f"It reaches VQModel's final PSNR after {min(reaching_seconds) / peer['seconds']:.0%} of the time."
            )
        elif shorter_runs:
            sentences.append("No shorter run of it reached VQModel's final PSNR.")
    return "\n\n".join(
        [
            (__doc__ or "").partition("\n\n")[2].strip(),
            f"{len(images.train):,} images of {images.size}×{images.size}, {images.channels} channel"
            f"{'s' * (images.channels > 1)}; {len(images.originals):,} held out; {minutes:g} minutes each; one seed.",
            metrics_table,
            " ".join(sentences),
        ]
    )


def run_set(name: str, minutes: float, quick: bool, shares: tuple[float, ...] = ()) -> Report:
    if quick:
        return run_benchmark(load_benchmark_images(name), 0.05, 0, RECIPES[:1], ())
    return run_benchmark(load_benchmark_images(name), minutes, 0, RECIPES, shares)


def run(quick: bool) -> Report:
    return run_set("embedded", 5.0, quick, SHARES)
