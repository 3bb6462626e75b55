"""latentloom inspect-prior: one HTML page of what surprises a pipeline's prior, and whether it repeats its training images."""

from dataclasses import dataclass
from pathlib import Path

from latentloom.checks import check_count, check_page, check_seed
from latentloom.commands.arguments import parse
from latentloom.inspection.prior_measure import inspect_prior
from latentloom.inspection.prior_page import prior_page
from latentloom.jobs.stages import load_source
from latentloom.report.numbers import count, number, percent
from pipelines.evaluation.feature_files import random_positions
from pipelines.latent_generation import LatentGenerationPipeline
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.sources import ImageSplit
from training_harness.files import write_text
from training_harness.processes import accelerated_device, is_main_process, main_process_first, print_once


@dataclass(frozen=True, kw_only=True)
class Arguments:
    pipeline: str
    """Run folder, pipeline folder or Hub repository."""
    data: str
    """Images that the pipeline was trained on. The test split is held out if there is one, else the validation split."""
    num_images: int = 1000
    """Held-out images to use, at most."""
    num_samples: int = 200
    """Samples to compare with the training images, the same number of each class."""
    max_training_images: int = 50_000
    """Training images to compare with, at most."""
    output: Path = Path("prior.html")
    """HTML file to write."""
    seed: int = 0
    """Random seed for the samples and the choice of images."""

    def __post_init__(self) -> None:
        for option, value in (
            ("--num-images", self.num_images),
            ("--num-samples", self.num_samples),
            ("--max-training-images", self.max_training_images),
        ):
            check_count(option, value)
        check_seed(self.seed)
        check_page(self.output, "prior.html")


GROUPS = {
    "data": ("pipeline", "data", "num_images", "num_samples", "max_training_images", "seed"),
    "output": ("output",),
}


def main(words: list[str]) -> None:
    a = parse(Arguments, "inspect-prior", words, GROUPS)
    with main_process_first():
        if is_main_process():
            draw(a)


def draw(a: Arguments) -> None:
    pipeline = LatentGenerationPipeline.from_pretrained(a.pipeline).to(accelerated_device())
    source = load_source(a.data).relabelled(pipeline.label_names)

    def pixels(split: ImageSplit, most: int) -> ImageLoader:
        drawn = random_positions(len(split), most, a.seed).tolist()
        found = ImageLoader(split.select(drawn), pipeline.tokenizer.config.image_processor)
        found.report_skipped()
        return found

    held_out, train = pixels(source.held_out, a.num_images), pixels(source.train, a.max_training_images)
    found = inspect_prior(pipeline, held_out, train, a.num_samples, a.seed)
    write_text(a.output, prior_page(pipeline, found, a.pipeline, a.data))
    shared = percent(float(found.neighbours.samples.median()))
    print_once(
        f"{count(len(found.bits), 'image')}, {number(found.bits.mean().item())} bits a code, {shared} of a sample's codes shared "
        f"with the nearest training image: {a.output}"
    )
