"""The same minutes for every quantizer and for diffusers' VQModel: what each makes of a set of small pictures.

Each tokenizer is trained from scratch, from reading the images to a saved model, with a learning rate that decays over the
given time. VQModel has the settings tuned for the comparison of whole stacks (docs/LOG.md) and trains for as many seconds as
our default took. If images are not 32×32, both are also trained on images padded to 32×32, which gives 64 codes at f = 4.
Metrics are on held-out images. The Fréchet distance is on features that no tokenizer was trained on: the reference
classifier's for the embedded images, EfficientNet-Lite0's for colour images.
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
from frame import Report, table
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
SHARES = (0.125, 0.25, 0.5)  # of the minutes, for our default on the first set: when is it where VQModel ends?
PADDED = 32  # pixels a side, for 64 codes at f = 4
CACHE = Path("~/.cache/latentloom/benchmarks").expanduser()
SHOWN = 12
COLUMNS = {"psnr": "PSNR, dB", "ssim": "SSIM", "frechet": "Fréchet distance", "perplexity": "perplexity"}
COLUMNS |= {"bits": "bits an image", "rate": "images/s", "seconds": "seconds"}


@dataclass
class BenchmarkImages:
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

    def figures(self, rebuilt: Tensor, indices: Tensor, codebook_size: int) -> dict[str, float]:
        counts = torch.bincount(indices.flatten(), minlength=codebook_size)
        return {
            "psnr": psnr(rebuilt, self.originals).mean().item(),
            "ssim": ssim(rebuilt, self.originals).mean().item(),
            "frechet": frechet_distance(self.extractor.extract(rebuilt).features, self.real),
            "perplexity": codebook_usage(counts).perplexity,
            "codes_used": int((counts > 0).sum()),
            "bits": indices[0].numel() * math.log2(codebook_size),
        }


def benchmark_images(name: str) -> BenchmarkImages:
    if name == "embedded":
        classifier = feature_extractor("classifier", classifier=classifier_path())
        return BenchmarkImages(name, FASHION_MNIST, load_source(FASHION_MNIST), 28, classifier)
    folder = image_sets.colour(CACHE / name)
    return BenchmarkImages(
        name, str(folder), open_source(folder), image_sets.SIDE, feature_extractor("efficientnet-lite0")
    )


def ours(pictures: BenchmarkImages, recipe: str, size: int, minutes: float, seed: int) -> tuple[dict[str, Any], Tensor]:
    """A recipe on the pictures, padded where they are smaller than `size` pixels a side."""
    with TemporaryDirectory() as temporary:
        fields = {"data": pictures.data, "output": str(Path(temporary) / "run"), "seed": seed, "sample_every": 10**9}
        fields |= {"resolution": str(size)}
        config = from_mapping(TokenizerTraining, training_values("tokenizer", recipe, None, fields))
        begin = time.perf_counter()
        folder = run_tokenizer(tokenizer_inputs(replace(config, checkpoint_every=10**9), pictures.source), minutes)
        seconds = time.perf_counter() - begin
        tokenizer = saved_tokenizer(folder)
        found = [reconstruct(tokenizer, batch) for batch in pictures.originals.split(BATCH)]
        rebuilt, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
        steps = int(next((folder.parent / "checkpoints").iterdir()).name.removeprefix("step_"))
        figures = pictures.figures(rebuilt, indices, tokenizer.codebook_size or 0)
        return figures | {"seconds": seconds, "rate": steps * config.batch_size / seconds}, rebuilt


def theirs(pictures: BenchmarkImages, size: int, seconds: float, seed: int) -> tuple[dict[str, Any], Tensor]:
    """VQModel on the same."""
    import baseline_stack

    content = (pictures.size, pictures.size)
    processor = replace(pictures.processor, image_size=(size, size), content_size=content)
    tuning = baseline_stack.Tuning()
    begin = time.perf_counter()
    pixels = processor.preprocess(pictures.train[range(len(pictures.train))])
    with reduced_matmul_precision(torch.device("cpu"), enabled=True):
        trained = baseline_stack.train_tokenizer(pixels, seconds, tuning, seed)
    seconds = time.perf_counter() - begin
    codes = baseline_stack.encode(trained.model, processor.preprocess(pictures.originals))
    rebuilt = processor.postprocess(baseline_stack.decode(trained.model, codes).float() / 127.5 - 1)
    rate = trained.steps * tuning.tokenizer_batch / seconds
    return pictures.figures(rebuilt, codes, baseline_stack.CODES) | {"seconds": seconds, "rate": rate}, rebuilt


def measured(
    pictures: BenchmarkImages, minutes: float, seed: int, recipes: tuple[str, ...], shares: tuple[float, ...]
) -> Report:
    rows: dict[str, dict[str, Any]] = {}
    shown = {"original": pictures.originals[:SHOWN]}

    def add(name: str, work: Callable[[], tuple[dict[str, Any], Tensor]]) -> None:
        rows[name], rebuilt = work()
        shown[name] = rebuilt[:SHOWN]
        print(name, {key: round(value, 3) for key, value in rows[name].items()}, flush=True)

    def add_ours(name: str, recipe: str, size: int, share: float = 1.0) -> None:
        add(name, lambda: ours(pictures, recipe, size, share * minutes, seed))

    default, *others = recipes
    own = sizes_of(pictures) if others else [pictures.size]
    for size in own:
        name = f"{default}, {codes_of(size)} codes"
        add_ours(name, default, size)
        add(f"{PEER}, {codes_of(size)} codes", lambda: theirs(pictures, size, rows[name]["seconds"], seed))  # noqa: B023 - called at once
    for share in shares:
        add_ours(f"{default}, {codes_of(pictures.size)} codes, {share:g} of the time", default, pictures.size, share)
    for recipe in others:
        add_ours(recipe, recipe, pictures.size)
    held_out = len(pictures.originals)
    figures = {
        "seed": seed,
        "minutes": minutes,
        "num_images": held_out,
        "features": pictures.extractor.name,
        "rows": rows,
    }
    return Report(
        name=f"tokenizer_quality_{pictures.name}",
        title=f"Quantizers after {minutes:g} minutes of training: {pictures.name} images",
        text=words(pictures, minutes, rows, recipes[0]),
        figures=figures,
        peers=("diffusers",),
        chart=lambda path: save_image(image_grid(torch.cat(list(shown.values())), SHOWN, list(shown), scale=2), path),
    )


def sizes_of(pictures: BenchmarkImages) -> list[int]:
    return sorted({pictures.size, PADDED})


def codes_of(size: int) -> int:
    """At f = 4."""
    return (size // 4) ** 2


def words(pictures: BenchmarkImages, minutes: float, rows: dict[str, dict[str, Any]], default: str) -> str:
    body = table(["", *COLUMNS.values()], [[name, *(row[key] for key in COLUMNS)] for name, row in rows.items()])
    said = []
    for codes in map(codes_of, sizes_of(pictures)):
        if (own := rows.get(f"{default}, {codes} codes")) is None:
            continue
        peer = rows[f"{PEER}, {codes} codes"]
        said.append(
            f"At {codes} codes our default, `{default}`, is {own['psnr'] - peer['psnr']:+.2f} dB from VQModel, with "
            f"{own['frechet'] / peer['frechet']:.0%} of its Fréchet distance."
        )
        early = [row for name, row in rows.items() if name.startswith(f"{default}, {codes} codes, ")]
        reached = [row["seconds"] for row in early if row["psnr"] >= peer["psnr"]]
        if reached:
            said.append(f"It reaches VQModel's final PSNR after {min(reached) / peer['seconds']:.0%} of the time.")
        elif early:
            said.append("No shorter run of it reached VQModel's final PSNR.")
    return "\n\n".join(
        [
            (__doc__ or "").partition("\n\n")[2].strip(),
            f"{len(pictures.train):,} images of {pictures.size}×{pictures.size}, {pictures.channels} channel"
            f"{'s' * (pictures.channels > 1)}; {len(pictures.originals):,} held out; {minutes:g} minutes each; one seed.",
            body,
            " ".join(said),
        ]
    )


def run_set(name: str, minutes: float, quick: bool, shares: tuple[float, ...] = ()) -> Report:
    if quick:
        return measured(benchmark_images(name), 0.05, 0, RECIPES[:1], ())
    return measured(benchmark_images(name), minutes, 0, RECIPES, shares)


def run(quick: bool) -> Report:
    return run_set("embedded", 5.0, quick, SHARES)
